"""One captured CUDA graph of a decode step serves every step of a server: its inputs are
overwritten in place with other slots, lengths and accepted counts, and it is replayed.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs

DEVICE = torch.device("cuda")
REPLAYS = 10_000
SEQUENCES, POOL = 8, 61
SIZES = (2, 2, 128, 128)
TOKENS = ("x", "raw_gate", "raw_beta", "output_gate")


@dataclass(frozen=True)
class Steps:
    """The inputs that change from step to step, for all steps, on the device; step i takes tokens
    `i % POOL`.
    """

    offsets: Tensor  # [steps, N + 1]
    slots: Tensor  # [steps, N] or [steps, N, 1 + num_spec]
    accepted: Tensor | None  # [steps, N]
    tokens: dict[str, Tensor]  # [POOL, ...]

    def write(self, i: int, inputs: dict[str, Any]) -> None:
        """Copies the step's values into the graph's inputs."""
        inputs["cu_seqlens"].copy_(self.offsets[i])
        inputs["state_indices"].copy_(self.slots[i])
        if self.accepted is not None:
            inputs["num_accepted"].copy_(self.accepted[i])
        for name, pool in self.tokens.items():
            inputs[name].copy_(pool[i % POOL])


def make(num_spec: int | None) -> dict[str, Any]:
    """A step with the most tokens; its values are replaced before it is used."""
    most = 1 + (num_spec or 0)
    return kda_decode_inputs(
        SEQUENCES,
        *SIZES,
        lengths=(most,) * SEQUENCES,
        num_spec=num_spec,
        accepted=None if num_spec is None else (1,) * SEQUENCES,
        device=DEVICE,
    )


def draw_steps(steps: int, num_spec: int | None, inputs: dict[str, Any]) -> Steps:
    """Every sequence in its own slots, some in the null block, with 0 to 1 + num_spec tokens."""
    columns, available = 1 + (num_spec or 0), len(inputs["state"])
    lengths = torch.randint(0, columns + 1, (steps, SEQUENCES), device=DEVICE)
    offsets = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(inputs["cu_seqlens"].dtype)
    order = torch.rand(steps, available - 1, device=DEVICE).argsort(1) + 1
    slots = order[:, : SEQUENCES * columns].view(steps, SEQUENCES, columns)
    null = torch.rand(steps, SEQUENCES, 1, device=DEVICE) < 0.1
    slots = torch.where(null, 0, slots).to(inputs["state_indices"].dtype)
    accepted = None
    if num_spec is not None:
        accepted = torch.randint(1, columns + 1, (steps, SEQUENCES), device=DEVICE)
        accepted = accepted.to(inputs["num_accepted"].dtype)
    tokens = {
        name: torch.randn(POOL, *inputs[name].shape, device=DEVICE).to(inputs[name].dtype)
        for name in TOKENS
    }
    return Steps(offsets, slots if num_spec is not None else slots[:, :, 0], accepted, tokens)


def captured(inputs: dict[str, Any]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The step as a graph, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kda_ops.fused.kda_decode(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kda_ops.fused.kda_decode(**inputs)
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("num_spec", [None, 2], ids=["one", "speculative"])
def test_ten_thousand_replays_are_ten_thousand_steps(num_spec: int | None) -> None:
    """Against eager calls on separate states, bit for bit after every step."""
    inputs = make(num_spec)
    steps = draw_steps(REPLAYS, num_spec, inputs)
    # not cloned: a clone's strides give a different kernel, which may round differently
    eager = make(num_spec)
    for name, y in inputs.items():
        if isinstance(y, Tensor):
            eager[name].copy_(y)
    states = ("conv_state", "state")
    start = {name: inputs[name].clone() for name in states}
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        graph, out = captured(inputs)
        for name in states:
            inputs[name].copy_(start[name])
        for i in range(REPLAYS):
            steps.write(i, inputs)
            graph.replay()
            steps.write(i, eager)
            wrong += (out != kda_ops.fused.kda_decode(**eager)).any()
    assert wrong.item() == 0, f"{wrong.item()} of {REPLAYS} steps differ"
    for name in states:
        assert torch.equal(inputs[name], eager[name]), f"{name} differs after {REPLAYS} steps"
        assert inputs[name].isfinite().all()
        assert not torch.equal(inputs[name], start[name])

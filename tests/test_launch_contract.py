"""What a compiled Kimi layer launches between its projections, read off generated CUDA code.

Prefill at most four kernels, decode exactly one, whatever the gate, the layout and the lengths; no
copies of a state, nothing filled, one graph for a stack of layers.
"""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from kda_ops.batch import KDABatch
from kda_ops.chunks import chunk_table
from kda_ops.layer import KimiDeltaAttention
from tests.fake_cuda import Summary, cuda_code, summary

HIDDEN, K, H = 64, 64, 2
DECODE = ["kda_decode_kernel"]
PREFILL = [
    "short_conv_qkv_kernel",
    "chunk_gated_prepare_kernel",
    "chunk_scan_kernel",
    "rms_norm_gated",
]
settings = pytest.mark.parametrize(
    ("layout", "lower_bound"), [("SD", None), ("DS", -5.0)], ids=["SD-softplus", "DS-bounded"]
)
lengths = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


class Stack(nn.Module):
    """Layers one after the other, and nothing between them."""

    def __init__(self, layers: int, layout: str, lower_bound: float | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            KimiDeltaAttention(
                HIDDEN,
                K,
                H,
                conv_layout=layout,
                lower_bound=lower_bound,
                allow_neg_eigval=lower_bound is not None,
                layer_idx=i,
                dtype=torch.bfloat16,
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor, states: Any = None, **how: Any) -> Tensor:
        for i, layer in enumerate(self.layers):
            state = None if states is None else states[i]
            x = layer(x, state=state, **how)
        return x


def compiled(stack: Stack, tokens: int, dynamic: bool, states: Any = None, **how: Any) -> Summary:
    """What the one graph of the stack launches, without its GEMMs."""
    x = torch.randn(1, tokens, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        _, (source,) = cuda_code(stack, x, states, dynamic=dynamic, **how)
    for forbidden in ("copy_(", "fill_(", "zero_(", ".item()", "synchronize()"):
        assert forbidden not in source[source.index("def call(") : source.index("\ndef benchmark")]
    found = summary(source)
    gemms = ("extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm")
    return Summary(
        found.launches,
        [name for name in found.externs if name not in gemms],
        found.allocations,
    )


def paged(stack: Stack, slots: int = 6) -> list[Any]:
    return [layer.state_spec().allocate(slots) for layer in stack.layers]


def expect(found: Summary, kernels: list[str]) -> None:
    assert found.externs == []
    assert len(found.launches) == len(kernels), str(found)
    for name, part in zip(found.launches, kernels, strict=True):
        assert part in name, str(found)


@lengths
@settings
def test_decode_is_one_launch(layout: str, lower_bound: float | None, dynamic: bool) -> None:
    stack = Stack(1, layout, lower_bound)
    batch = KDABatch.decode([1, 2, 3])
    expect(compiled(stack, 3, dynamic, paged(stack), batch=batch), DECODE)


def test_speculative_decode_keeps_the_recurrence_apart() -> None:
    """Several tokens per sequence are faster in kernels of their own."""
    stack = Stack(1, "DS", None)
    batch = KDABatch.decode([[1, 2], [3, 4]], lengths=[2, 1], num_accepted=[2, 1], num_tokens=5)
    states = [layer.state_spec(num_spec=1).allocate(6) for layer in stack.layers]
    found = compiled(stack, 5, False, states, batch=batch)
    ours = [name for name in found.launches if not name.startswith("triton_")]
    assert ours == ["short_conv_update_kernel", "recurrent_kda_kernel"]


@lengths
@settings
def test_paged_prefill_is_four_launches(
    layout: str, lower_bound: float | None, dynamic: bool
) -> None:
    stack = Stack(1, layout, lower_bound)
    batch = KDABatch.prefill([70, 30], [1, 2], has_initial_state=[True, False], num_tokens=104)
    expect(compiled(stack, 104, dynamic, paged(stack), batch=batch), PREFILL)


@lengths
def test_packed_sequences_are_four_launches(dynamic: bool) -> None:
    cu = torch.tensor([0, 50, 130], dtype=torch.int32)
    found = compiled(Stack(1, "SD", -5.0), 130, dynamic, cu_seqlens=cu, chunks=chunk_table(cu, 130))
    expect(found, PREFILL)


@lengths
def test_one_sequence_is_four_launches(dynamic: bool) -> None:
    expect(compiled(Stack(1, "SD", None), 130, dynamic), PREFILL)


def test_four_layers_are_one_graph() -> None:
    stack = Stack(4, "DS", -5.0)
    batch = KDABatch.decode([1, 2, 3])
    expect(compiled(stack, 3, True, paged(stack), batch=batch), 4 * DECODE)
    batch = KDABatch.prefill([70, 30], [1, 2])
    expect(compiled(stack, 100, False, paged(stack), batch=batch), 4 * PREFILL)

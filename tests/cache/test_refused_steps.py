"""A rejected step writes nothing: no state of a composite gets ahead of another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import kda_ops
from kda_ops import config
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.demos.disaggregated.model import Caches, Stack, StackConfig
from kda_ops.integrations.vllm import kda_state_copy_func
from kda_ops.nn.layer import KimiDeltaAttention
from tests.support.operators import cases

HIDDEN = 16
SLOTS = 8
BATCHES: dict[str, Callable[..., KDABatch]] = {
    "decode": lambda **kw: KDABatch.decode([1, 2], **kw),
    "speculative": lambda **kw: KDABatch.decode(
        [[1, 2], [3, 4]], lengths=[2, 1], num_accepted=[1, 2], **kw
    ),
    "prefill": lambda **kw: KDABatch.prefill([3, 5], [1, 2], has_initial_state=[True, False], **kw),
    "mixed": lambda **kw: KDABatch.mixed([1, 1], [3, 5], [1, 2, 3, 4], **kw),
}
batches = pytest.mark.parametrize("kind", BATCHES)
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])
WITHOUT_GRADIENT = (
    "in_proj.weight",
    "f_proj.weight",
    "conv_weight",
    "conv_bias",
    "A_log",
    "dt_bias",
)
WITH_GRADIENT = ("g_proj.weight", "g_proj.bias", "o_norm_weight", "o_proj.weight")


class Step:
    """A frozen layer, nonzero states, and a batch."""

    def __init__(self, kind: str, layout: str = "SD", device: str = "cpu") -> None:
        self.layer = KimiDeltaAttention(
            HIDDEN, 8, 2, conv_bias=True, conv_layout=layout, device=device
        ).requires_grad_(False)
        self.batch = BATCHES[kind](device=device)
        num_spec = 1 if self.batch.state_indices.dim() == 2 else 0
        spec = self.layer.state_spec(num_spec=num_spec)
        self.conv, self.recurrent = spec.allocate(SLOTS, device=device)
        self.conv.normal_()
        self.recurrent.normal_()
        self.hidden = torch.randn(1, self.batch.num_tokens, HIDDEN, device=device)

    def __call__(self, **replaced: Tensor) -> Any:
        """The step with some tensors replaced: inputs, states or parameters."""
        hidden = replaced.pop("hidden", self.hidden)
        state = (replaced.pop("conv", self.conv), replaced.pop("recurrent", self.recurrent))
        options = {"state": state, "batch": self.batch}
        return functional_call(self.layer, replaced, (hidden,), options)

    def tensor(self, name: str) -> Tensor:
        return dict(self.layer.named_parameters()).get(name, getattr(self, name, None))

    def refused(self, error: type[Exception], match: str, **replaced: Tensor) -> None:
        refused(error, match, lambda: self(**replaced), self.conv, self.recurrent)


def refused(error: type[Exception], match: str, call: Callable[[], Any], *states: Tensor) -> None:
    """The call raises and leaves every state unchanged, bit for bit."""
    before = [x.detach().clone() for x in states]
    with pytest.raises(error, match=match):
        call()
    for x, old in zip(states, before, strict=True):
        assert torch.equal(x, old)


@batches
@layouts
def test_an_accepted_step_writes_both_states(kind: str, layout: str) -> None:
    step = Step(kind, layout)
    before = [step.conv.clone(), step.recurrent.clone()]
    step()
    for x, old in zip((step.conv, step.recurrent), before, strict=True):
        assert not torch.equal(x, old)


@batches
@layouts
def test_inputs_that_require_grad(kind: str, layout: str) -> None:
    step = Step(kind, layout)
    for name in (*WITHOUT_GRADIENT, "hidden", "conv", "recurrent"):
        x = step.tensor(name).detach().requires_grad_()
        step.refused(
            RuntimeError, "in place and has no gradient, but .* requires grad", **{name: x}
        )
    for name in WITH_GRADIENT:  # of what follows the states there is one
        x = step.tensor(name).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(step(**{name: x}).square().sum(), x)
        assert gradient.any(), name


@batches
def test_tangents(kind: str) -> None:
    step = Step(kind)
    for name in (*WITHOUT_GRADIENT, "hidden", "conv", "recurrent"):
        with forward_ad.dual_level(), torch.no_grad():
            x = step.tensor(name)
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            step.refused(NotImplementedError, "no derivative in forward mode", **{name: dual})


@batches
def test_a_user_projection_with_gradients(kind: str) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.factor = base, nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * self.factor

    step = Step(kind)
    step.layer.f_proj = Adapter(step.layer.f_proj)
    step.refused(RuntimeError, "the output of f_proj requires grad")


@batches
@layouts
def test_mismatched_parameters(kind: str, layout: str) -> None:
    step = Step(kind, layout)
    for name in ("conv_weight", "conv_bias", "A_log", "dt_bias", "o_norm_weight"):
        x = step.tensor(name)
        for wrong in (x[:-1], x.to(torch.int64)):
            step.refused(ValueError, f"{name.removeprefix('conv_')} must have", **{name: wrong})
    x = step.tensor("o_proj.weight")
    for wrong in (x[:, :-1], x.to(torch.int64), x.double()):
        step.refused(ValueError, "o_proj.weight must have", **{"o_proj.weight": wrong})
    step.layer.norm_eps = -1.0
    step.refused(ValueError, "norm_eps must not be negative")


@batches
@layouts
def test_mismatched_states(kind: str, layout: str) -> None:
    step = Step(kind, layout)
    for name in ("conv", "recurrent"):
        x = step.tensor(name)
        for wrong in (
            x[:-1],
            x[:, :-1],
            x[:, :, :-1],
            x[..., :-1],
            x.to(torch.int64),
            x.to("meta"),
        ):
            step.refused(ValueError, " must ", **{name: wrong})
    step.refused(ValueError, "recurrent must have dtype", recurrent=step.recurrent.half())


@batches
def test_states_made_in_inference_mode(kind: str) -> None:
    step = Step(kind)
    for name in ("conv", "recurrent"):
        with torch.inference_mode():
            x = step.tensor(name).clone()
        step.refused(RuntimeError, f"{name} was made under torch.inference_mode", **{name: x})


@pytest.mark.parametrize(
    ("kind", "name", "place", "value", "match"),
    [
        ("decode", "state_indices", 1, SLOTS, "state_indices must be below"),
        ("decode", "state_indices", 1, 1, "state_indices must not share a slot"),
        ("speculative", "state_indices", (1, 1), SLOTS, "state_indices must be below"),
        ("speculative", "state_indices", (1, 1), 2, "state_indices must not share a slot"),
        ("speculative", "num_accepted", 1, 3, "num_accepted must be in"),
        ("speculative", "cu_seqlens", 1, 3, "cu_seqlens"),
        ("prefill", "state_indices", 1, 1, "state_indices must not share a slot"),
        ("prefill", "chunk_indices", (1, 0), 0, "chunk_indices must be"),
        ("mixed", "state_indices", 3, SLOTS, "state_indices must be below"),
        ("mixed", "state_indices", 3, 2, "state_indices must not share a slot"),
        ("mixed", "prefill_cu_seqlens", 1, 4, "prefill_cu_seqlens must be"),
        ("mixed", "chunk_indices", (1, 0), 0, "chunk_indices must be"),
    ],
)
def test_refilled_values(kind: str, name: str, place: Any, value: int, match: str) -> None:
    step = Step(kind)
    getattr(step.batch, name)[place] = value
    step.refused(ValueError, match)


@pytest.mark.gpu
def test_values_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "check_values", True)
    step = Step("speculative", device="cuda")
    step.batch.state_indices[1, 1] = SLOTS
    step.refused(ValueError, "state_indices must be below")


@pytest.mark.gpu
@batches
@layouts
def test_inputs_that_require_grad_on_a_gpu(kind: str, layout: str) -> None:
    step = Step(kind, layout, device="cuda")
    for name in (*WITHOUT_GRADIENT, "hidden", "conv", "recurrent"):
        x = step.tensor(name).detach().requires_grad_()
        step.refused(
            RuntimeError, "in place and has no gradient, but .* requires grad", **{name: x}
        )


def test_compiled_steps_raise_at_trace_time() -> None:
    step = Step("decode")
    step.layer.A_log.requires_grad_()
    compiled = torch.compile(step.layer, backend="eager")
    state = (step.conv, step.recurrent)

    def call() -> None:
        compiled(step.hidden, state=state, batch=step.batch)

    refused(RuntimeError, "in place and has no gradient", call, *state)


DECODE = {case.name: case for case in cases("kda_decode")}


@pytest.mark.parametrize("name", ["SD-bf16", "DS-speculative", "apart-DS-fp32-gva-ragged"])
def test_a_fused_decode(name: str) -> None:
    inputs = DECODE[name].make(torch.device("cpu"))
    unpacked = isinstance(inputs["conv_state"], tuple)
    states = [*(inputs["conv_state"] if unpacked else [inputs["conv_state"]]), inputs["state"]]
    for x in states:  # NaN is not equal to itself
        x.nan_to_num_()

    def refuse(error: type[Exception], match: str, **other: Any) -> None:
        refused(error, match, lambda: kda_ops.fused.kda_decode(**(inputs | other)), *states)

    for argument in (
        "raw_gate",
        "raw_beta",
        "output_gate",
        "A_log",
        "dt_bias",
        "norm_weight",
        "state",
    ):
        x = inputs[argument]
        if x is None:
            continue
        refuse(RuntimeError, f"{argument} requires grad", **{argument: x.detach().requires_grad_()})
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            refuse(NotImplementedError, f"{argument} has a tangent", **{argument: dual})
        refuse(ValueError, "must have", **{argument: x[..., :-1]})
        refuse(ValueError, f"{argument} must have dtype", **{argument: x.to(torch.int64)})
    with torch.inference_mode():
        inference = inputs["state"].clone()
    refuse(RuntimeError, "state was made under torch.inference_mode", state=inference)
    slots = inputs["state_indices"].clone()
    slots.view(-1)[-1] = len(inputs["state"])
    refuse(ValueError, "state_indices must be below", state_indices=slots)


def test_copies_of_states_for_vllm() -> None:
    spec = KDAStateSpec(2, 2, 8, 8, num_spec=1, conv_dtype=torch.float32)
    conv, recurrent = spec.allocate(SLOTS, layers=2)
    conv.normal_()
    recurrent.normal_()
    copy = kda_state_copy_func(num_spec=1)
    right, wrong = ([1, 2, 3], 0, 2, 2), ([4, 5, SLOTS], 0, 2, 1)

    def call(*requests: Any) -> None:
        copy(conv, recurrent, *zip(*requests, strict=True))

    refused(ValueError, "plan must have dst", lambda: call(right, wrong), conv, recurrent)
    short = ([4, 5], 0, 2, 1)
    refused(ValueError, "must hold position", lambda: call(right, short), conv, recurrent)
    before = recurrent.clone()
    recurrent.requires_grad_()
    refused(RuntimeError, "recurrent requires grad", lambda: call(right), conv, recurrent)
    with torch.no_grad():
        call(right)
    assert torch.equal(recurrent[:, 3], before[:, 2])


def test_a_stack_of_layers() -> None:
    """All layers of the demo's model, attention and KDA, or none."""
    config = StackConfig(pages=SLOTS)
    stack, caches = Stack(config), Caches(config, 1)
    tokens = torch.arange(20)

    def call(
        slot: int = 1, count: int = 20, blocks: tuple[int, ...] = (1, 2), start: int = 0
    ) -> Any:
        batch = KDABatch.prefill([count], [slot])
        return stack(tokens, caches, batch, list(blocks), start)

    def refuse(match: str, **other: Any) -> None:
        states = (caches.conv, caches.recurrent, caches.kv)
        refused(ValueError, match, lambda: call(**other), *states)

    refuse("state_indices must be below", slot=SLOTS)
    refuse("batch must have 20 tokens", count=19)
    refuse("blocks must be at least 2", blocks=(1,))
    refuse("blocks must be at least 3", start=16)
    refuse("blocks must be in", blocks=(1, SLOTS))
    call()
    for cache in (caches.conv, caches.recurrent, caches.kv):
        assert cache.any()

"""Operators that take q, k and v packed or unpacked: equal results, and errors."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._cases import unpacked
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from tests.support.operators import public_function, run_kernels

CPU = torch.device("cpu")
WIDTHS = (32, 32, 48)


def together(name: str, layout: str) -> dict[str, Any]:
    torch.manual_seed(0)
    if name == "kda_decode":
        return kda_decode_inputs(3, 2, 4, 16, 12, layout, bias=True, null=(1,), device=CPU)
    return short_conv_qkv_inputs(
        3,
        7,
        2,
        16,
        48,
        layout=layout,
        state_indices=(2, 0, 5),
        initial=(1, 0, 0),
        bias=True,
        device=CPU,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_unpacked_equals_packed(layout: str) -> None:
    """Bit for bit: one kernel that finds its channels elsewhere."""
    inputs = together("short_conv_qkv", layout)
    separate = unpacked(inputs, WIDTHS)
    run = run_kernels(public_function("short_conv_qkv"))
    for x, y in zip(run(**inputs), run(**separate), strict=True):
        assert torch.equal(x, y)
    states = torch.cat(separate["conv_state"], dim=2 if layout == "SD" else 1)
    assert torch.equal(states, inputs["conv_state"])


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_unpacked_equals_packed_in_a_step(layout: str) -> None:
    inputs = together("kda_decode", layout)
    separate = unpacked(inputs, WIDTHS) | {"state": inputs["state"].clone()}
    run = run_kernels(public_function("kda_decode"))
    assert torch.equal(run(**inputs), run(**separate))
    states = torch.cat(separate["conv_state"], dim=2 if layout == "SD" else 1)
    assert torch.equal(states, inputs["conv_state"])
    assert torch.equal(separate["state"], inputs["state"])


def second(parts: tuple[Tensor, ...], x: Any) -> tuple[Any, ...]:
    return parts[0], x, parts[2]


ERRORS: list[tuple[str, Any, str]] = [
    ("x", lambda x: torch.cat(x, dim=-1), "x must be three tensors, of q, k and v"),
    ("weight", lambda x: x[:2], "weight must be three tensors, of q, k and v"),
    ("bias", lambda x: x[0], "bias must be three tensors, of q, k and v"),
    ("bias", lambda x: second(x, None), "bias must be three tensors, got Tensor, NoneType, Tensor"),
    ("conv_state", lambda x: x[0], "conv_state must be three tensors"),
    ("x", lambda x: second(x, x[1].float()), "x must have dtype bfloat16, got float32"),
    ("weight", lambda x: second(x, x[1].half()), "weight must have dtype bfloat16, got float16"),
    ("weight", lambda x: second(x, x[1][:, :3]), "weight must have shape [32, 4], got (32, 3)"),
    ("x", lambda x: second(x, x[1][..., :16]), "weight must have shape [16, 4], got (32, 4)"),
    ("x", lambda x: second(x, x[1][:1]), "x must have shape"),
    ("conv_state", lambda x: second(x, x[1][:-1]), "as many slots and rows for q, k and v"),
    ("conv_state", lambda x: second(x, x[1].repeat(1, 2, 1)), "as many slots and rows for"),
    ("conv_state", lambda x: second(x, x[1].mT.contiguous().mT), "one stride along the channels"),
]


@pytest.mark.parametrize("name", ["short_conv_qkv", "kda_decode"])
@pytest.mark.parametrize(("argument", "change", "message"), ERRORS)
def test_errors(name: str, argument: str, change: Any, message: str) -> None:
    inputs = unpacked(together(name, "SD"), WIDTHS)
    with pytest.raises(ValueError, match=re.escape(message)):
        public_function(name)(**inputs | {argument: change(inputs[argument])})


@pytest.mark.parametrize("name", ["short_conv_qkv", "kda_decode"])
def test_k_has_the_channels_of_q(name: str) -> None:
    inputs = unpacked(together(name, "SD"), (32, 48, 32))
    with pytest.raises(ValueError, match=r"x must have shape \[.*32\], got \(.*48\)"):
        public_function(name)(**inputs)


def test_gradients_of_each_part() -> None:
    """The same as of the packed call."""
    inputs = short_conv_qkv_inputs(1, 5, 2, 4, 12, torch.float64, bias=True, device=CPU)
    names = ("x", "weight", "bias")
    packed = {name: inputs[name].requires_grad_() for name in names}
    separate = unpacked({n: x.detach() if n in names else x for n, x in inputs.items()}, (8, 8, 12))
    for name in names:
        separate[name] = tuple(part.requires_grad_() for part in separate[name])
    for call in (inputs, separate):
        sum((y * y).sum() for y in kda_ops.fused.short_conv_qkv(**call)).backward()
    for name, x in packed.items():
        got = torch.cat([part.grad for part in separate[name]], dim=-1 if name == "x" else 0)
        torch.testing.assert_close(got, x.grad)

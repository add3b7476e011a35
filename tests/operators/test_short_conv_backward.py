"""The gradient kernel of the short convolution against the reference in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.conv.short_conv.backward import launch_short_conv_backward
from kda_ops.tuning import override
from tests.support.bounds import within_tensors
from tests.support.oracle import assert_close, poisoned

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = [0, 0, 1, 3, 30, 30, 52]  # rows past 52 are padding
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-sequence": {"batch": None},
    "bias": {"bias": True, "dtype": FP16},
    "no-activation": {"activation": None, "bias": True},
    "ragged": {"batch": 1, "T": 60, "cu_seqlens": SHORT, "bias": True},
    "no-sequences": {"batch": 1, "cu_seqlens": [0]},
    "no-tokens": {"T": 0, "bias": True},
    "two-taps": {"W": 2, "dtype": FP32},
    "five-taps": {"W": 5, "T": 37},
    "shorter-than-taps": {"T": 2},
    "strided": {"padded": 24, "dtype": FP32},
    "transposed": {"transposed": True},
    "wide": {"D": 300, "T": 20},
    "large": {"scale": 100.0},
    "large-exact": {"scale": 30.0, "dtype": FP32},
}
NEEDS = {"all": (True, True, True), "x": (True, False, False), "taps": (False, True, False)}


def arguments(
    device: str, batch: int | None = 2, T: int = 30, D: int = 24, W: int = 4, bias: bool = False,
    activation: str | None = "silu", dtype: torch.dtype = BF16, cu_seqlens: list[int] | None = None,
    padded: int = 0, transposed: bool = False, scale: float = 1.0,
) -> tuple[list[Any], Tensor]:  # fmt: skip
    """The operator's arguments, and the gradient of its result, NaN past the last sequence."""
    shape = (T, D + padded) if batch is None else (batch, T, D + padded)
    x = (scale * torch.randn(shape)).to(dtype).to(device)[..., :D]
    if transposed:
        x = x.mT.contiguous().mT
    dy = torch.randn(x.shape).to(dtype).to(device)
    offsets = None
    if cu_seqlens is not None:
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        x[:, cu_seqlens[-1] :] = torch.nan
        dy[:, cu_seqlens[-1] :] = torch.nan
    weight = (torch.randn(D, W, device=device) / W**0.5).to(dtype)
    return [x, weight, torch.randn(D, device=device) if bias else None, activation, offsets], dy


def exact(args: list[Any], dy: Tensor, needs: list[bool], dtype: torch.dtype | None) -> list[Any]:
    def on_cpu(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.cpu().nan_to_num() if x.is_floating_point() else x.cpu()
        return x.to(dtype or x.dtype) if x.is_floating_point() else x

    found = torch.ops.kda_ops.short_conv_backward(*map(on_cpu, args), on_cpu(dy), needs)
    return [x for x, need in zip(found, needs[:3], strict=True) if need]


def assert_gradients(device: str, needed: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    args, dy = arguments(device, **options)
    needs = [need and x is not None for need, x in zip(NEEDS[needed], args[:3], strict=True)]
    needs += [False, False]
    with poisoned():
        found = launch_short_conv_backward(*args, [dy], needs)
    low, high = exact(args, dy, needs, None), exact(args, dy, needs, torch.float64)
    for x, y, z in zip(found, low, high, strict=True):
        assert_close(x, y, z, dy.dtype)
        assert x.is_contiguous()


def assert_in_place(device: str, widths: tuple[int, ...]) -> None:
    """From the parts of y's gradient into a part of a wider one."""
    args, dy = arguments(device, D=sum(widths), bias=True)
    needs = [True, True, True, False, False]
    whole = torch.full((*dy.shape[:2], sum(widths) + 10), 7.0, dtype=dy.dtype, device=device)
    dx = whole[..., 4:-6]
    parts = [y.contiguous() for y in dy.split(widths, -1)]
    found = launch_short_conv_backward(*args, [parts], needs, dx)
    assert found[0] is dx
    assert (whole[..., :4] == 7).all()
    assert (whole[..., -6:] == 7).all()
    low, high = exact(args, dy, needs, None), exact(args, dy, needs, torch.float64)
    for x, y, z in zip(found, low, high, strict=True):
        assert_close(x, y, z, dy.dtype)


def small_blocks() -> Any:
    """Several blocks of tokens in a sequence."""
    values = {"STEP_T": 4, "BLOCK_D": 16, "MAX_STEPS": 2, "PROGRAMS": 1, "num_warps": 1}
    return override({"short_conv_backward": values})


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_the_interpreter(name: str) -> None:
    with within_tensors(), small_blocks():
        assert_gradients("cpu", "all", CASES[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("needed", ["x", "taps"])
def test_only_what_is_needed(needed: str) -> None:
    with within_tensors(), small_blocks():
        assert_gradients("cpu", needed, {"bias": True})


some_widths = pytest.mark.parametrize("widths", [(16, 32, 16), (32, 16), (16, 8, 24)], ids=str)


@pytest.mark.interpreter
@some_widths
def test_in_place_in_the_interpreter(widths: tuple[int, ...]) -> None:
    with small_blocks():
        assert_in_place("cpu", widths)


@pytest.mark.gpu
@some_widths
def test_in_place_on_the_gpu(widths: tuple[int, ...]) -> None:
    with small_blocks():
        assert_in_place("cuda", widths)


@pytest.mark.gpu
@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_gpu(name: str, needed: str) -> None:
    assert_gradients("cuda", needed, CASES[name])
    with small_blocks():
        assert_gradients("cuda", needed, CASES[name])


@pytest.mark.gpu
def test_results_are_bitwise_reproducible() -> None:
    args, dy = arguments("cuda", T=2000, D=1024, bias=True)
    first, second = (
        launch_short_conv_backward(*args, [dy], [True] * 3 + [False] * 2) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_an_unused_result_has_no_gradient() -> None:
    args, _ = arguments("cpu", bias=True)
    assert kda_ops
    found = torch.ops.kda_ops.short_conv_backward(*args, None, [True] * 3 + [False] * 2)
    for x, y in zip(found, args, strict=False):
        assert torch.equal(x, torch.zeros_like(y))
    launched = launch_short_conv_backward(*args, [None], [True] * 3 + [False] * 2)
    assert all(map(torch.equal, launched, found))

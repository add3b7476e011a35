"""The gradient kernel of the gated norm against the reference in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.norm.rms_norm_gated.backward import launch_rms_norm_gated_backward
from kda_ops.tuning import override
from tests.support.bounds import within_tensors
from tests.support.oracle import assert_close, poisoned

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, dict[str, Any]] = {
    "heads": {"shape": (1, 37, 2, 64)},
    "one-row": {"shape": (16,), "dtype": FP32},
    "odd-width": {"shape": (3, 5, 24), "dtype": FP16},
    "strided": {"shape": (2, 9, 2, 16), "padded": 8},
    "five-axes": {"shape": (2, 1, 3, 2, 16), "padded": 8, "dtype": FP32},
    "no-rows": {"shape": (0, 16)},
    "wide": {"shape": (5, 256), "weight_dtype": FP32},
}
NEEDS = {"all": [True] * 3, "o": [True, False, False], "weight": [False, False, True]}


def arguments(
    device: str, shape: tuple[int, ...], dtype: torch.dtype = BF16, padded: int = 0,
    weight_dtype: torch.dtype | None = None,
) -> tuple[list[Any], Tensor]:  # fmt: skip
    *leading, V = shape
    o, gate = (torch.randn(*leading, V + padded).to(dtype).to(device)[..., :V] for _ in range(2))
    weight = torch.randn(V).to(weight_dtype or dtype).to(device)
    return [o, gate, weight, 1e-5], torch.randn(shape).to(dtype).to(device)


def assert_gradients(device: str, needed: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    args, dy = arguments(device, **options)
    needs = [*NEEDS[needed], False]
    with poisoned():
        found = launch_rms_norm_gated_backward(*args, [dy], needs)
    triples = [found]
    for dtype in (None, torch.float64):
        inputs = [x.cpu().to(dtype or x.dtype) if isinstance(x, Tensor) else x for x in args]
        results = torch.ops.kda_ops.rms_norm_gated_backward(
            *inputs, dy.cpu().to(dtype or dy.dtype), needs
        )
        triples.append([x for x, need in zip(results, needs, strict=False) if need])
    for x, y, z in zip(*triples, strict=True):
        assert_close(x, y, z, dy.dtype)


def small_blocks() -> Any:
    """Several programs with several blocks of rows."""
    return override({"rms_norm_gated_backward": {"TILE": 256, "PROGRAMS": 2, "num_warps": 1}})


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_the_interpreter(name: str) -> None:
    with within_tensors(), small_blocks():
        assert_gradients("cpu", "all", CASES[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("needed", ["o", "weight"])
def test_only_what_is_needed(needed: str) -> None:
    with within_tensors(), small_blocks():
        assert_gradients("cpu", needed, CASES["heads"])


@pytest.mark.gpu
@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_gpu(name: str, needed: str) -> None:
    assert_gradients("cuda", needed, CASES[name])
    with small_blocks():
        assert_gradients("cuda", needed, CASES[name])


@pytest.mark.gpu
def test_results_are_bitwise_reproducible() -> None:
    args, dy = arguments("cuda", (1, 2000, 8, 128))
    first, second = (launch_rms_norm_gated_backward(*args, [dy], [True] * 4) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_unused_result_has_no_gradient() -> None:
    args, _ = arguments("cpu", (3, 16))
    for x, y in zip(launch_rms_norm_gated_backward(*args, [None], [True] * 4), args, strict=False):
        assert torch.equal(x, torch.zeros_like(y))

"""Every operator's cases against fp64:

reference, kernel in the interpreter, compiled on the CPU, kernel and compiled on the GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from kda_ops._cases import Case
from tests.support.bounds import within_tensors
from tests.support.operators import NAMES, all_cases, cases, public_function, run_kernels
from tests.support.oracle import assert_accurate, copy_inputs, tensors

MOVES_ONLY = {"conv_split", "state_copy"}  # elements of any dtype
FP64_ERROR = r"\w+ must have dtype float16, bfloat16 or float32 on a GPU, got float64"


def cases_as_parameters(*, kernels: bool) -> Any:
    params = [pytest.param(n, c, id=f"{n}-{c.name}") for n, c in all_cases(kernels=kernels)]
    return pytest.mark.parametrize(("name", "case"), params)


every_case = cases_as_parameters(kernels=False)
every_case_with_kernels = cases_as_parameters(kernels=True)


def compiled(name: str, *, dynamic: bool | None = None) -> Any:
    return torch.compile(public_function(name), fullgraph=True, dynamic=dynamic)


@pytest.mark.interpreter
@every_case_with_kernels
def test_kernel_in_the_interpreter(name: str, case: Case) -> None:
    with within_tensors():
        assert_accurate(run_kernels(public_function(name)), public_function(name), case)


def strided(x: Any) -> Any:
    """A small tensor with gaps between its elements; all others unchanged."""
    if not isinstance(x, Tensor) or x.dim() > 2:
        return x
    wide = torch.stack([x, torch.ones_like(x)], dim=-1)
    return wide[..., 0]


def cases_of_small_arguments() -> Any:
    """For every operator the first case with each argument of at most two axes."""
    chosen = []
    for name in NAMES:
        seen: set[str] = set()
        for case in cases(name, kernels=True):
            inputs = case.make(torch.device("cpu"))
            small = {n for n, x in inputs.items() if isinstance(x, Tensor) and x.dim() <= 2}
            if small - seen:
                chosen.append(pytest.param(name, case, id=f"{name}-{case.name}"))
            seen |= small
    return pytest.mark.parametrize(("name", "case"), chosen)


@pytest.mark.interpreter
@cases_of_small_arguments()
def test_kernels_read_small_arguments_at_their_strides(name: str, case: Case) -> None:
    """Slots may be a column of a block table, offsets a slice of a buffer, rates an expanded
    number: a kernel that ignores strides reads the wrong elements.
    """
    inputs = case.make(torch.device("cpu"))
    call = run_kernels(public_function(name))
    dense, gaps = copy_inputs(inputs), {n: strided(x) for n, x in copy_inputs(inputs).items()}
    results = [
        [*tensors(call(**given)), *tensors([given[n] for n in case.mutated])]
        for given in (dense, gaps)
    ]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@every_case
def test_compiled_cpu(name: str, case: Case) -> None:
    assert_accurate(compiled(name), public_function(name), case)


@pytest.mark.gpu
@every_case_with_kernels
def test_kernel_on_the_gpu(name: str, case: Case) -> None:
    assert_accurate(public_function(name), public_function(name), case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_case_with_kernels
def test_compiled_gpu(name: str, case: Case, dynamic: bool) -> None:
    assert_accurate(compiled(name, dynamic=dynamic), public_function(name), case, "cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_kernels_reject_fp64(name: str) -> None:
    """Nothing falls back to the reference, and nothing is written."""
    inputs = copy_inputs(cases(name)[0].make(torch.device("cpu")), torch.float64)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    call = run_kernels(public_function(name))
    if name in MOVES_ONLY:
        call(**inputs)
        return
    with pytest.raises(ValueError, match=FP64_ERROR):
        call(**inputs)
    for n, x in before.items():
        assert torch.equal(inputs[n].nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_fp64_on_a_gpu_is_an_error_while_traced(name: str) -> None:
    inputs = copy_inputs(cases(name)[0].make(torch.device("cpu")), torch.float64)
    with FakeTensorMode():
        fakes = tree_map_only(
            Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), inputs
        )
        if name in MOVES_ONLY:
            public_function(name)(**fakes)
            return
        with pytest.raises(ValueError, match=FP64_ERROR):
            public_function(name)(**fakes)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", sorted({*NAMES} - MOVES_ONLY))
def test_fp64_on_the_gpu_is_an_error(name: str, compile: bool) -> None:
    inputs = copy_inputs(cases(name)[0].make(torch.device("cpu")), torch.float64)
    inputs = tree_map_only(Tensor, Tensor.cuda, inputs)
    call = compiled(name) if compile else public_function(name)
    with pytest.raises(Exception, match=FP64_ERROR) as error:
        call(**inputs)
    assert compile or type(error.value) is ValueError

"""Every operator's cases against fp64:

reference, kernel in the interpreter, compiled on the CPU, kernel and compiled on the GPU.
"""

from typing import Any

import pytest
import torch

from kda_ops._cases import Case
from tests.operators import all_cases, public_function, run_kernels
from tests.oracle import assert_accurate

every_case = pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{c.name}") for n, c in all_cases()]
)


def compiled(name: str, *, dynamic: bool | None = None) -> Any:
    return torch.compile(public_function(name), fullgraph=True, dynamic=dynamic)


@pytest.mark.interpreter
@every_case
def test_kernel_in_the_interpreter(name: str, case: Case) -> None:
    assert_accurate(run_kernels(public_function(name)), public_function(name), case)


@every_case
def test_compiled_cpu(name: str, case: Case) -> None:
    assert_accurate(compiled(name), public_function(name), case)


@pytest.mark.gpu
@every_case
def test_kernel_on_the_gpu(name: str, case: Case) -> None:
    assert_accurate(public_function(name), public_function(name), case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_case
def test_compiled_gpu(name: str, case: Case, dynamic: bool) -> None:
    assert_accurate(compiled(name, dynamic=dynamic), public_function(name), case, "cuda")

"""States that a compiled graph copies, steps and restores, in whole or in part, equal those of
eager code; a step that is not rolled back copies no cache. See docs/inductor-rollback.md.
"""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from kda_ops.lowering.explain.generated_code import body, summary
from tests.support.fake_cuda import cuda_code
from tests.support.rollbacks import (
    DECODES,
    RECURRENT,
    STEPPERS,
    Inputs,
    Stepper,
    compare,
    random_inputs,
    random_program,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "inductor-rollback.md"
Step = Callable[[Sequence[Tensor]], list[Tensor]]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def put_back(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [x.clone() for x in states]
    results = step(states)
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    return results


def put_back_from_copies(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [torch.empty_like(x).copy_(x) for x in states]
    results = step(states)
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    return results


def put_back_after_two_steps(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [x.clone() for x in states]
    results = [*step(states), *step(states)]
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    return results


def put_back_between_two_steps(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    first = step(states)
    before = [x.clone() for x in states]
    second = step(states)
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    return [*first, *second, *step(states)]


def put_back_and_returned(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [x.clone() for x in states]
    results = step(states)
    after = [x.clone() for x in states]
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    return [*results, *before, *after]


def only_one_put_back(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = states[-1].clone()
    results = step(states)
    states[-1].copy_(before)
    return results


def a_page_put_back(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [x.clone() for x in states]
    results = step(states)
    for x, old in zip(states, before, strict=True):
        x[1] = old[1]
    return results


def pages_chosen(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [x.clone() for x in states]
    results = step(states)
    for x, old in zip(states, before, strict=True):
        even = torch.arange(len(x), device=x.device) % 2 == 0
        x.copy_(torch.where(even[(...,) + (None,) * (x.dim() - 1)], x, old))
    return results


def stepped_separately(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    draft = [x.clone() for x in states]
    return [*step(states), *step(draft), *step(draft), *draft]


def the_copy_stepped(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    draft = [x.clone() for x in states]
    results = step(draft)
    return [*results, *step(states), *(x - y for x, y in zip(states, draft, strict=True))]


def read_late(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    before = [2 * x for x in states]
    results = step(states)
    return [*results, *(x + 1 for x in before), *(x + 1 for x in states)]


def turned_around(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    results = step(states)
    for x in states:
        x.copy_(x.flip(0))
    return results


def moved_by_a_page(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    results = step(states)
    for x in states:
        x[1:] = x[:-1].clone()
    return results


def a_view_of_what_is_computed(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    results = step([x.clone() for x in states])
    for x in states:
        x[1:].copy_(x.roll(1, 0)[1:])
    return results


def a_separate_scatter(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    results = step([x.clone() for x in states])
    marked = [x.index_fill(0, torch.tensor([1], device=x.device), 0.5) for x in states]
    for x in states:
        x.zero_()
    return [*results, *marked]


def stepped(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    return step(states)


def stepped_twice(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    return [*step(states), *step(states)]


def read_before_and_after(states: Sequence[Tensor], step: Step) -> list[Tensor]:
    old = [2 * x.sum() for x in states]
    results = step(states)
    return [*results, *(x + 1 for x in old), *(x.mean() for x in states)]


def swapped(states: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    a, b = states
    results = RECURRENT((a,), inputs)
    before = a.clone()
    a.copy_(b)
    b.copy_(before)
    return results + RECURRENT((a,), inputs)


PROGRAMS = [
    put_back_from_copies,
    put_back_after_two_steps,
    put_back_between_two_steps,
    put_back_and_returned,
    only_one_put_back,
    a_page_put_back,
    pages_chosen,
    stepped_separately,
    the_copy_stepped,
    read_late,
    turned_around,
    moved_by_a_page,
    a_view_of_what_is_computed,
    a_separate_scatter,
]


def with_inputs(program: Any, stepper: Stepper) -> Callable[..., list[Tensor]]:
    """`program` of the states and of the operator's other arguments."""

    def run(states: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        return program(states, lambda states: stepper(tuple(states), inputs))

    return run


@devices
@pytest.mark.parametrize("stepper", STEPPERS, ids=str)
def test_a_step_that_is_rolled_back(stepper: Stepper, device: str) -> None:
    compare(with_inputs(put_back, stepper), *stepper.inputs(device))


@devices
@pytest.mark.parametrize("stepper", [RECURRENT, DECODES[1]], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_other_programs(program: Any, stepper: Stepper, device: str) -> None:
    compare(with_inputs(program, stepper), *stepper.inputs(device))


@devices
@pytest.mark.parametrize("stepper", [RECURRENT, DECODES[0]], ids=str)
@pytest.mark.parametrize("program", [put_back, a_page_put_back], ids=lambda p: p.__name__)
def test_dynamic_sizes(program: Any, stepper: Stepper, device: str) -> None:
    compare(with_inputs(program, stepper), *stepper.inputs(device), dynamic=True)


@devices
@pytest.mark.parametrize("whole", [False, True], ids=["one layer", "the cache"])
def test_a_layer_of_a_cache(whole: bool, device: str) -> None:
    """The state is a view; the copy is of it, or of the cache that it is in."""
    (state,), inputs = RECURRENT.inputs(device)

    def program(cache: Tensor, inputs: Inputs) -> list[Tensor]:
        before = cache.clone() if whole else cache[1].clone()
        results = RECURRENT((cache[1],), inputs)
        if whole:
            cache.copy_(before)
        else:
            cache[1].copy_(before)
        return results

    compare(program, torch.stack([state, 2 * state]), inputs)


@devices
def test_states_that_are_swapped(device: str) -> None:
    (state,), inputs = RECURRENT.inputs(device)
    compare(swapped, [state, 2 * state], inputs)


@devices
@pytest.mark.parametrize("seed", range(15))
def test_random_programs(seed: int, device: str) -> None:
    program = random_program(seed)
    compare(lambda states, inputs: program(states, inputs), *random_inputs(program, device))


def caches(code: str, states: Sequence[Tensor]) -> int:
    """How many buffers of the size of a state a generated module allocates."""
    shapes = re.findall(r" = empty_strided_\w+\(\((.*?)\), ", body(code)[0])
    sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes]
    return sum(size in [x.numel() for x in states] for size in sizes)


def code_for(device: str, program: Any, stepper: Stepper) -> tuple[str, Sequence[Tensor]]:
    """What Inductor generates for a program, and the states that it is called with."""
    function, (states, inputs) = with_inputs(program, stepper), stepper.inputs("cpu")
    with torch.no_grad():
        if device == "cuda":
            _, (code,) = cuda_code(function, states, inputs)
        else:
            _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), states, inputs)
    return code, states


generated = pytest.mark.parametrize("device", ["cpu", "cuda"])  # generated code needs no GPU
stateful = pytest.mark.parametrize("stepper", [RECURRENT, DECODES[0]], ids=str)


@generated
@stateful
@pytest.mark.parametrize(
    "program", [stepped, stepped_twice, read_before_and_after], ids=lambda p: p.__name__
)
def test_an_ordinary_step_copies_no_cache(program: Any, stepper: Stepper, device: str) -> None:
    code, states = code_for(device, program, stepper)
    assert caches(code, states) == 0


@stateful
def test_one_copy_is_made_before_a_step_that_is_rolled_back(stepper: Stepper) -> None:
    code, states = code_for("cuda", put_back, stepper)
    *before, last = summary(code).launches
    assert last == f"{stepper.name}_kernel"
    assert [name[:6] for name in before] == ["triton"] * len(states)
    assert caches(code, states) == len(states)


@stateful
def test_one_copy_is_made_for_a_page(stepper: Stepper) -> None:
    code, states = code_for("cuda", a_page_put_back, stepper)
    kernel = summary(code).launches.index(f"{stepper.name}_kernel")
    assert kernel == len(states)
    assert caches(code, states) == len(states)


def test_the_document_matches_this_torch(tmp_path: Path) -> None:
    """Its script, which does not use this package, gives wrong results in every function."""
    script = "".join(re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S))
    path = tmp_path / "script.py"  # Dynamo reads the source
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^(\w+): eager (.*) compiled (.*)$", done.stdout, re.M)
    assert len(shown) == 5
    mended = [name for name, eager, compiled in shown if eager == compiled]
    assert not mended, (
        f"torch {torch.__version__} compiles {mended} as it should: "
        f"the end of {DOCUMENT.name} says what can be dropped"
    )

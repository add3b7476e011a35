"""Programs that copy states, step them and restore them, as the code that is generated for a GPU
computes them: Inductor's kernels around the hand-written ones, in Triton's interpreter.

`test_rollback` runs the same programs where there is a GPU, and on the CPU, whose generated code
has no hand-written kernel.
"""

from typing import Any

import pytest

from tests.lowering.test_rollback import PROGRAMS, put_back, swapped, with_inputs
from tests.support.rollbacks import (
    DECODES,
    RECURRENT,
    Stepper,
    compare,
    random_inputs,
    random_program,
)


@pytest.mark.parametrize("stepper", [RECURRENT, DECODES[0]], ids=str)
@pytest.mark.parametrize("program", [put_back, *PROGRAMS], ids=lambda program: program.__name__)
def test_programs(program: Any, stepper: Stepper) -> None:
    compare(with_inputs(program, stepper), *stepper.inputs("cpu"), interpreted=True)


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed: int) -> None:
    program = random_program(seed)
    compare(
        lambda states, inputs: program(states, inputs),
        *random_inputs(program, "cpu"),
        interpreted=True,
    )


def test_states_that_are_swapped() -> None:
    (state,), inputs = RECURRENT.inputs("cpu")
    compare(swapped, [state, 2 * state], inputs, interpreted=True)

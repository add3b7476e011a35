"""Accuracy of the gradients of the core: relative Frobenius errors against those of the recurrence,
token by token in fp64, of ours and the baselines' on the inputs of `bench_core_accuracy`.

Runs after `bench_training`: FLA autotunes at the first size it sees, and these are short.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from perf import bench_core_accuracy
from perf.baselines.cudnn import cudnn, cudnn_from_raw
from perf.baselines.fla import fla
from perf.bench_core import NAMES, core, fused_core
from perf.bench_core_accuracy import CASES, step_recurrence
from perf.bench_training import fla_core, with_gradient
from perf.harness.accuracy import accuracy_row, errors_of
from perf.harness.gradients import UnavailableError, differentiated
from perf.harness.rows import OURS, SEED, Call, Inputs, Prepare
from perf.harness.timing import CLOCK, event_seconds

# The recurrence keeps four [H, 128, 128] in fp64 for each token: 2 GB a sample.
T, H = 512, 8
SAMPLES = 16  # of A_log's gradient 128 numbers: their error is known to 6 %


def make(name: str, sample: int, device: torch.device) -> Inputs:
    """The same inputs and gradient of the output for all providers, `[1, T, H, 128]`."""
    with mock.patch.multiple(bench_core_accuracy, T=T, H=H):
        return with_gradient(bench_core_accuracy.make(name, SEED + sample, device))


def gradients_of(function: Callable[..., Any]) -> Prepare:
    """Autograd through a core."""

    def prepare(inputs: Inputs) -> Call:
        given = dict(inputs)
        do = given.pop("do")
        leaves = [given[name].detach().requires_grad_() for name in NAMES]
        given |= dict(zip(NAMES, leaves, strict=True))
        return differentiated(True, leaves, lambda: function(**given)[0], do)

    return prepare


def exact_gradients(inputs: Inputs) -> list[Tensor]:
    """In fp64, of inputs as they are rounded."""
    double = {key: x.double() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    return list(gradients_of(step_recurrence)(double)()[1])


def providers() -> dict[str, Prepare]:
    """Baselines first, so that ours can be compared with them; FLA's last of them."""
    return {
        **cudnn(cudnn_from_raw),
        **fla(fla_core(True)),
        OURS: gradients_of(core),
        f"{OURS}, fused": gradients_of(fused_core),
    }


@functools.cache
def samples(name: str, device: torch.device) -> list[tuple[Inputs, list[Tensor]]]:
    """Inputs and exact gradients of a case, made once for all its rows."""
    inputs = [make(name, sample, device) for sample in range(SAMPLES)]
    return [(sample, exact_gradients(sample)) for sample in inputs]


def measured(name: str, prepare: Prepare, device: torch.device) -> tuple[dict[str, float], Call]:
    """The errors of a provider, and one of its calls."""
    calls = [prepare(inputs) for inputs, _ in samples(name, device)]
    found = [call()[1] for call in calls]
    exact = [gradients for _, gradients in samples(name, device)]
    return errors_of([f"d{x}" for x in NAMES], found, exact), calls[0]


@pytest.fixture(scope="module")
def baseline_errors() -> dict[str, dict[str, Any]]:
    return {}


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("name", CASES)
def bench_training_accuracy(
    name: str, provider: str, baseline_errors: dict[str, dict[str, Any]], benchmark: Any
) -> None:
    try:
        errors, call = measured(name, providers()[provider], torch.device("cuda"))
    except UnavailableError as error:
        pytest.skip(f"errors of {name}, {provider}: {error}")
    benchmark.pedantic(lambda: CLOCK.advance(event_seconds(call)), rounds=1)
    row = accuracy_row("gradient_accuracy", name, provider, errors, baseline_errors)
    benchmark.extra_info.update(row)

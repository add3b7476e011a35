"""Accuracy of the prefill core: relative Frobenius errors of the output and of the final state
against the recurrence, token by token in fp64, ours and FLA's on the same inputs.

If tokens forget everything before them, a final state depends on few roundings, and a single sample
decides by a percent between equally good ones: errors are over several samples together.

Runs after `bench_core`: FLA autotunes at the first size it sees, and these are short.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from perf.baselines.fla import fla, fla_core
from perf.bench_core import core, core_inputs, fused_core
from perf.harness.accuracy import accuracy_row, errors_of
from perf.harness.rows import OURS, SEED, Inputs, Prepare, direct
from perf.harness.timing import CLOCK, event_seconds

T, H = 512, 32
SAMPLES = 8
NORM_EPS = 1e-6


def plain(inputs: Inputs) -> Inputs:
    return inputs


def harsh(inputs: Inputs) -> Inputs:
    """Tokens that forget everything: decays down to e^-60 and below, or to the bound."""
    return inputs | {
        "raw_gate": 4 * inputs["raw_gate"],
        "A_log": torch.full_like(inputs["A_log"], 2.77),
    }


def near_identical_keys(inputs: Inputs) -> Inputs:
    """Keys that differ by a percent, decaying by about a thousandth per token: every token corrects
    what the previous one wrote.
    """
    k = inputs["k"]
    log_rate = -2.3 if inputs["lower_bound"] is None else 0.7  # the bounded gate has it inside
    A_log = torch.full_like(inputs["A_log"], log_rate)
    return inputs | {"k": k[:, :1] + 0.01 * k, "A_log": A_log}


CASES: dict[str, tuple[float | None, Callable[[Inputs], Inputs]]] = {
    "softplus": (None, plain),
    "bounded": (-5.0, plain),
    "softplus-harsh": (None, harsh),
    "bounded-harsh": (-5.0, harsh),
    "softplus-near-identical-keys": (None, near_identical_keys),
    "bounded-near-identical-keys": (-5.0, near_identical_keys),
}


def make(name: str, sample: int, device: torch.device) -> Inputs:
    """The same inputs for all providers, `[1, T, H, 128]`."""
    lower_bound, change = CASES[name]
    torch.manual_seed(SEED + sample)
    return change(core_inputs(device, (T,), H, lower_bound))


def step_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_gate: Tensor,
    raw_beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
) -> tuple[Tensor, Tensor]:
    """The definition in fp64: `[1, T, H, V]` outputs and `[1, H, V, K]` final states."""
    q, k, v, x, beta = (y[0].double() for y in (q, k, v, raw_gate, raw_beta))
    q, k = (y / (y.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for y in (q, k))
    rate, z = A_log.double().exp()[:, None], x + dt_bias.double()
    if lower_bound is None:
        decay = (-rate * torch.logaddexp(z, torch.zeros_like(z))).exp()
    else:
        decay = (lower_bound * torch.sigmoid(rate * z)).exp()
    beta = beta.sigmoid()
    S = torch.zeros(q.shape[1], v.shape[2], q.shape[2], dtype=torch.float64, device=q.device)
    o = []
    for t in range(len(q)):
        S = S * decay[t, :, None, :]
        rest = v[t] - (S @ k[t, :, :, None])[..., 0]
        S = S + beta[t, :, None, None] * rest[:, :, None] * k[t, :, None, :]
        o.append((S @ q[t, :, :, None])[..., 0] * q.shape[2] ** -0.5)
    return torch.stack(o)[None], S[None]


def providers() -> dict[str, Prepare]:
    """Baselines first, so that ours can be compared with them."""
    return {
        **{provider: baseline(None) for provider, baseline in fla(fla_core).items()},
        OURS: direct(core),
        f"{OURS}, fused": direct(fused_core),
    }


@pytest.fixture(scope="module")
def exact() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Filled case by case."""
    return {}


@pytest.fixture(scope="module")
def baseline_errors() -> dict[str, dict[str, Any]]:
    return {}


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("name", CASES)
def bench_core_accuracy(
    name: str,
    provider: str,
    exact: dict[str, list[tuple[Tensor, Tensor]]],
    baseline_errors: dict[str, dict[str, Any]],
    benchmark: Any,
) -> None:
    device = torch.device("cuda")
    with torch.no_grad():
        samples = [make(name, sample, device) for sample in range(SAMPLES)]
        if name not in exact:
            exact[name] = [step_recurrence(**sample) for sample in samples]
        calls = [providers()[provider](sample) for sample in samples]
        results = [call() for call in calls]
        benchmark.pedantic(lambda: CLOCK.advance(event_seconds(calls[0])), rounds=1)
    errors = errors_of(("o", "S"), results, exact[name])
    benchmark.extra_info.update(accuracy_row("accuracy", name, provider, errors, baseline_errors))

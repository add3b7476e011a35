"""Rows of accuracy: relative Frobenius errors of an implementation, beside a baseline's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perf.harness.machine import gpu, software
from perf.harness.rows import OURS, relative_error

Errors = dict[str, float]


def errors_of(
    names: Sequence[str],
    found: Sequence[Sequence[Tensor]],
    exact: Sequence[Sequence[Tensor]],
) -> Errors:
    """The error of each result, over all samples together.

    Args:
        names: Of the results.
        found: By sample, the results.
        exact: The same in fp64.
    """
    pairs = zip(names, zip(*found, strict=True), zip(*exact, strict=True), strict=True)
    return {f"error_{name}": relative_error(torch.cat(o), torch.cat(x)) for name, o, x in pairs}


def accuracy_row(
    kind: str, name: str, provider: str, errors: Errors, baselines: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is recorded.

    Args:
        kind: A key of `perf.analysis.targets.ACCURACY`.
        name: The case.
        provider: The implementation.
        errors: Its errors.
        baselines: Filled by the rows of baselines, by case, for the rows of ours after them.
    """
    if provider.startswith(OURS):
        beside = baselines.get(name, {})
    else:
        beside = {}
        baselines[name] = {"baseline": provider}
        baselines[name] |= {f"baseline_{key}": error for key, error in errors.items()}
    versions = {key: software()[key] for key in ("torch", "triton", "fla")}
    return {kind: name, "provider": provider, **errors, **beside, "gpu": gpu()["gpu"], **versions}

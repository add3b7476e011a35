"""Gradients of chunked KDA by its kernels, and by the reference in fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import kda_ops
from kda_ops._cases import operator_packages
from kda_ops._gradients import TABLES
from kda_ops._registry import OPERATORS
from kda_ops.varlen import prepare_chunk_indices
from tests.support.oracle import assert_close, copy_inputs, poisoned


@dataclass(frozen=True)
class KernelCase:
    """An operator, what `<name>_inputs` of its cases takes, what is done to the inputs, and whether
    the final state has a gradient.
    """

    operator: str
    options: dict[str, Any]
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    final: bool = True


def arguments(case: KernelCase, device: torch.device) -> dict[str, Any]:
    """The operator's arguments in its schema's order."""
    cases = import_module(f"{operator_packages()[case.operator]}.cases")
    inputs = getattr(cases, f"{case.operator}_inputs")(device, **case.options)
    if case.change is not None:
        inputs = case.change(inputs)
    offsets = inputs.get("cu_seqlens")
    inputs |= {
        "scale": inputs.get("scale", inputs["q"].shape[3] ** -0.5),
        "output_final_state": case.final,
        "chunk_indices": None
        if offsets is None
        else prepare_chunk_indices(offsets, inputs["q"].shape[1]),
    }
    schema = getattr(torch.ops.kda_ops, case.operator).default._schema
    return {x.name: inputs.get(x.name) for x in schema.arguments}


def differentiable(inputs: dict[str, Any]) -> list[bool]:
    return [isinstance(x, Tensor) and x.is_floating_point() for x in inputs.values()]


def output_gradients(inputs: dict[str, Any]) -> list[Tensor | None]:
    """Random; past the last sequence NaN."""
    v, offsets, initial = (inputs[name] for name in ("v", "cu_seqlens", "initial_state"))
    do = torch.randn_like(v)
    N = v.shape[0]
    if offsets is not None:
        do[:, int(offsets[-1]) :] = torch.nan
        N = len(offsets) - 1
    if not inputs["output_final_state"]:
        return [do, None]
    shape = (N, *v.shape[2:], inputs["q"].shape[3])
    dtype = torch.float32 if initial is None else initial.dtype
    return [do, torch.randn(shape, device=v.device).to(dtype)]


def launch(
    operator: str, inputs: dict[str, Any], given: list[Tensor | None], needs: list[bool],
    saved: dict[str, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients from the kernels."""
    module = import_module(f"{operator_packages()[operator]}.backward")
    found: list[Tensor] = getattr(module, f"launch_{operator}_backward")(
        *inputs.values(), given, needs, **(saved or {})
    )
    return found


def launch_saving(
    operator: str, inputs: dict[str, Any]
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """The forward's results, and what it saves for the gradient."""
    module = import_module(f"{operator_packages()[operator]}.backward")
    found = getattr(module, f"launch_{operator}_saving")(*inputs.values())
    saving = OPERATORS[getattr(torch.ops.kda_ops, operator).default].saving
    assert saving is not None
    return saving.split_results(found)


def launch_case(case: KernelCase, device: torch.device) -> list[Tensor]:
    inputs = arguments(case, device)
    return launch(case.operator, inputs, output_gradients(inputs), differentiable(inputs))


def reference(
    operator: str,
    inputs: dict[str, Any],
    given: list[Tensor | None],
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """The gradients of the reference on the CPU, in `dtype` if one is given."""
    backward = getattr(torch.ops.kda_ops, f"{operator}_backward").default
    given = [None if g is None else g.cpu().nan_to_num().to(dtype or g.dtype) for g in given]
    found = backward(*copy_inputs(inputs, dtype).values(), *given, needs)
    by_place = iter(found)  # one for each tensor argument that has a gradient
    places = [
        str(x.type) in ("Tensor", "Optional[Tensor]") and x.name not in TABLES
        for x in backward._schema.arguments[: len(inputs)]
    ]
    gradients = [next(by_place) if place else None for place in places]
    return [x for x, need in zip(gradients, needs, strict=True) if need and x is not None]


def assert_gradients(case: KernelCase, device: torch.device) -> None:
    """Checks the kernels' gradients against fp64, with fresh allocations poisoned."""
    assert kda_ops
    inputs = arguments(case, device)
    given, needs = output_gradients(inputs), differentiable(inputs)
    with poisoned():
        found = launch(case.operator, inputs, given, needs)
    expected = reference(case.operator, inputs, given, needs, torch.float64)
    low = reference(case.operator, inputs, given, needs, None)
    names = [name for name, need in zip(inputs, needs, strict=True) if need]
    for name, x, y, z in zip(names, found, low, expected, strict=True):
        try:
            assert_close(x, y, z, inputs["v"].dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None

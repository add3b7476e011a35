"""The one tolerance rule: everything is compared with fp64.

A result is accepted when it is finite wherever the oracle is and

    max|out - fp64| <= 2 * (max|reference - fp64| + eps * max|fp64|)

where `reference` is the eager CPU implementation on the same inputs in the same dtypes, and eps is
that of the result's dtype or of the case's `operand_dtype`, whichever is coarser. There are no
other tolerances.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kda_ops._cases import Case


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialized allocation with NaN (integers with their largest value)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an operator's result, in order."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)]


def copy_inputs(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Dense CPU copies, floating-point tensors in `dtype` if one is given."""

    def copy(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(copy(part) for part in x)
        if not isinstance(x, Tensor):
            return x
        return (
            x.detach()
            .cpu()
            .clone()
            .to(dtype if dtype is not None and x.is_floating_point() else x.dtype)
        )

    return {name: copy(x) for name, x in inputs.items()}


def evaluate(
    function: Callable[..., Any], inputs: dict[str, Any], mutated: tuple[str, ...]
) -> list[Tensor]:
    """Results of a call, then the arguments it wrote."""
    with torch.no_grad():
        result = tensors(function(**inputs))
    return [*result, *tensors([inputs[name] for name in mutated])]


def assert_close(
    out: Tensor, reference: Tensor, fp64: Tensor, operand_dtype: torch.dtype | None = None
) -> None:
    """Applies the tolerance rule to one tensor."""
    assert out.shape == fp64.shape, f"shape {tuple(out.shape)}, expected {tuple(fp64.shape)}"
    assert out.dtype == reference.dtype, f"dtype {out.dtype}, expected {reference.dtype}"
    if not out.dtype.is_floating_point:
        assert torch.equal(out.cpu(), fp64), "integer results differ"
        return
    out64, reference64 = (x.detach().cpu().double() for x in (out, reference))
    finite = fp64.isfinite()
    assert torch.equal(out64[~finite].nan_to_num(0, 1, -1), fp64[~finite].nan_to_num(0, 1, -1)), (
        "non-finite values"
    )
    assert out64[finite].isfinite().all(), (
        f"{(~out64[finite].isfinite()).sum()} values are not finite"
    )
    if not finite.any():
        return
    eps = torch.finfo(out.dtype).eps
    if operand_dtype is not None:
        eps = max(eps, torch.finfo(operand_dtype).eps)
    error = (out64 - fp64)[finite].abs().max().item()
    reference_error = (reference64 - fp64)[finite].abs().max().item()
    scale = fp64[finite].abs().max().item()
    limit = 2 * (reference_error + eps * scale)
    assert error <= limit, (
        f"max error {error:.3e}, limit {limit:.3e} "
        f"(reference {reference_error:.3e}, scale {scale:.3e})"
    )


def assert_accurate(
    function: Callable[..., Any],
    public: Callable[..., Any],
    case: Case,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> None:
    """Runs one implementation of a case (`function`) and compares it with the public function in
    fp64 on the CPU.

    Fresh allocations are poisoned. If a written argument is a view, the rest of its storage must be
    unchanged.
    """
    torch.manual_seed(seed)
    inputs = case.make(torch.device(device))
    expected = evaluate(public, copy_inputs(inputs, torch.float64), case.mutated)
    reference = evaluate(public, copy_inputs(inputs), case.mutated)
    written = [(name, x) for name in case.mutated for x in tensors(inputs[name])]
    before = [_storage_bytes(x).clone() for _, x in written]
    with poisoned():
        out = evaluate(function, inputs, case.mutated)
    assert len(out) == len(expected)
    for o, r, e in zip(out, reference, expected, strict=True):
        assert_close(o, r, e, case.operand_dtype)
    for (name, x), old in zip(written, before, strict=True):
        _assert_untouched_outside(name, x, old)


def _storage_bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _assert_untouched_outside(name: str, view: Tensor, before: Tensor) -> None:
    """The bytes of the view's storage that the view does not cover are those in `before`."""
    after = _storage_bytes(view)
    covered = torch.zeros_like(before)
    marks = torch.empty(0, dtype=torch.uint8, device=view.device).set_(covered.untyped_storage())
    itemsize = view.element_size()
    offsets = torch.full((1,), view.storage_offset(), device=view.device)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(size, device=view.device) * stride).flatten()
    marks.view(-1, itemsize)[offsets] = 1
    outside = covered == 0
    assert torch.equal(after[outside], before[outside]), (
        f"{name}: bytes outside the view were written"
    )

"""One way to register an operator, and the one seam through which `kda_ops` reaches `lowering`.

`define_op` turns a schema, a reference and a fake implementation into `torch.ops.kda_ops.<name>`:

* CPU runs the reference, CUDA runs the launcher (imported on the first launch, so that importing
  the package never loads Triton), which takes no fp64;
* the fake implementation calls `lowering.install()` as soon as something is traced, which is before
  anything is lowered or looked up in a cache;
* a functional operator differentiates through an operator of its own, `<name>_backward`, whose
  implementation is the vector-Jacobian product of the reference. It is opaque to the compiler, so a
  compiled backward graph has one call per operator;
* an operator that writes to an argument refuses arguments that require grad;
* `check_values` runs before the implementation, so it also runs in compiled graphs that fall back
  to the implementation.

`torch.library.Library.define` / `impl` are used directly since a call through them costs 1-2
microseconds, a call through `torch.library.custom_op` 7-9.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from kda_ops import choice, config
from kda_ops._checks import check_kernel_dtype

NAMESPACE = "kda_ops"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Operator:
    """What stands behind one operator; see `define_op`."""

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: Callable[..., Any]
    check_values: Callable[..., None] | None


OPERATORS: dict[Any, Operator] = {}


def activate_lowerings() -> None:
    """Installs the Inductor lowerings while something is being compiled (idempotent, cheap).

    On the first compile of a process Dynamo traces before Inductor is imported, and AOTAutograd
    takes its cache key before it calls a fake implementation again. Waiting for Inductor would
    leave our sources out of that key, and a changed lowering would be served old code. So a trace
    is enough; it loads Inductor also for another backend, which costs seconds, once.
    """
    if "torch._inductor.lowering" in sys.modules or TracingContext.try_get() is not None:
        import lowering

        lowering.install()


def lowering_module(name: str) -> Any:
    """`lowering.<name>`, imported now: costs seconds, as it loads Inductor."""
    return importlib.import_module(f"lowering.{name}")


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: str,
    check_values: Callable[..., None] | None = None,
    moves_only: bool = False,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Registers one operator and returns its `OpOverload`.

    Args:
        schema: The operator's schema without a namespace, such as
            `"gate(Tensor x, Tensor? A_log) -> Tensor"`: every argument positional and without a
            default. Written arguments carry `(a!)`.
        reference: The definition in eager PyTorch, called with the schema's arguments in order. It
            is the CPU implementation and the source of gradients. It never returns an input or a
            view of one.
        fake: Shapes, dtypes and strides of the result.
        cuda: `"module:function"` of the kernel launcher, same arguments.
        check_values: Raises `ValueError` for bad tensor *values*. Called with the same arguments
            before the implementation, for CPU tensors always, for CUDA tensors when
            `kda_ops.config.check_values`.
        moves_only: Whether the kernel copies elements and computes nothing, so that fp64 is a dtype
            like any other. All other operators refuse fp64 on a GPU, also while they are traced.
        tags: Extra operator tags.
    """
    name = schema[: schema.index("(")]
    names = [x.name for x in torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments]
    mutates = "!" in schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    load = _lazy(cuda, names)

    def launcher(*args: Any) -> Any:
        if not moves_only:
            _refuse_fp64(op, args)
        return load(*args)

    def cpu_impl(*args: Any) -> Any:
        if check_values is not None:
            check_values(*args)
        return reference(*args)

    def cuda_impl(*args: Any) -> Any:
        if check_values is not None and config.check_values:
            check_values(*args)
        return launcher(*args)

    def fake_impl(*args: Any) -> Any:
        activate_lowerings()
        if not moves_only and any(isinstance(x, Tensor) and x.is_cuda for x in args):
            _refuse_fp64(op, args)
        return fake(*args)

    _LIBRARY.impl(name, cpu_impl, "CPU")
    _LIBRARY.impl(name, cuda_impl, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_impl, lib=_LIBRARY)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.kda_ops, packet), overload or "default")
    OPERATORS[op] = Operator(reference, fake, launcher, check_values)
    if mutates:
        _refuse_gradients(name, op)
    else:
        _differentiate_reference(schema, name, op, reference)
    return op


def _lazy(target: str, names: list[str]) -> Callable[..., Any]:
    """A function that imports `module:function` on its first call.

    While the function runs, kernels are chosen for it; `names` are those of its arguments.
    """
    module, _, attribute = target.partition(":")
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), attribute))
        with choice.calling(found[0], names, args):
            return found[0](*args)

    return call


def _refuse_fp64(op: Any, args: tuple[Any, ...]) -> None:
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and x.dtype is torch.float64:
            check_kernel_dtype(op._schema.arguments[i].name, x)


def _refuse_gradients(name: str, op: Any) -> None:
    def autograd_impl(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(op._schema.arguments, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"kda_ops::{name} writes its state in place and has no gradient, but "
                        f"argument {argument.name} requires grad; call it under torch.no_grad() "
                        "or torch.inference_mode()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, autograd_impl, "Autograd", with_keyset=True)


def _differentiate_reference(
    schema: str, name: str, op: Any, reference: Callable[..., Any]
) -> None:
    """Registers `<name>_backward` and makes it the operator's gradient.

    The backward operator takes the forward's arguments, one gradient per output (None where an
    output was not used) and which arguments need a gradient; it returns the gradients of those, in
    order.
    """
    backward_name = name.replace(".", "_") + "_backward"
    inputs = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    _LIBRARY.define(
        f"{backward_name}({inputs}, Tensor?[] output_gradients, bool[] needs_gradient) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def backward_impl(*args: Any) -> list[Tensor]:
        *inputs, output_gradients, needs_gradient = args
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
                for x, need in zip(inputs, needs_gradient, strict=True)
            ]
            outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [
            (o, g)
            for o, g in zip(outputs, output_gradients, strict=True)
            if g is not None and o.requires_grad
        ]
        wanted = [x for x, need in zip(inputs, needs_gradient, strict=True) if need]
        if not pairs:
            return [torch.zeros_like(x) for x in wanted]
        gradients = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
        return [
            torch.zeros_like(x) if g is None else g.contiguous()
            for x, g in zip(wanted, gradients, strict=True)
        ]

    def backward_fake(*args: Any) -> list[Tensor]:
        *inputs, _, needs_gradient = args
        return [
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x, need in zip(inputs, needs_gradient, strict=True)
            if need
        ]

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(backward_name, backward_impl, key)
    torch.library.register_fake(f"{NAMESPACE}::{backward_name}", backward_fake, lib=_LIBRARY)
    backward_op = getattr(torch.ops.kda_ops, backward_name).default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])
        ctx.constants = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if len(gradients) == 1 and isinstance(gradients[0], (tuple, list)):
            gradients = tuple(gradients[0])
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if c is None else c[0] for c in ctx.constants]
        needs = [
            need and isinstance(x, Tensor)
            for x, need in zip(inputs, ctx.needs_input_grad, strict=True)
        ]
        found = iter(backward_op(*inputs, list(gradients), needs))
        return tuple(next(found) if need else None for need in needs)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )

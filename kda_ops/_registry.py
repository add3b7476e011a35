"""The one way to register an operator, and the only place where `kda_ops` imports `lowering`.

`define_op` turns a schema, a reference and a fake implementation into `torch.ops.kda_ops.<name>`:

* the CPU runs the reference, CUDA runs the launcher (imported on the first launch, so that
  importing the package never loads Triton), which does not take fp64;
* the fake implementation calls `lowering.install()` as soon as anything is traced, before it is
  lowered or looked up in a cache;
* DTensors run by the rules of `_sharding`;
* autocast is disabled inside the operator: it computes in the dtypes of its inputs, and so does its
  gradient;
* a functional operator differentiates through its own operator `<name>_backward`: the
  vector-Jacobian product of the reference, or dedicated kernels on CUDA (see `_gradients`), which
  may read what a second forward saves (see `_saving`);
* an operator that writes to an argument rejects arguments that require grad;
* `check_values` runs before the implementation, also in compiled graphs that call the
  implementation.

`torch.ops.kda_ops_reference.<name>` is the same operator with its reference on every device. Public
functions call what `selected` returns, which is that one with `kda_ops.config.impl = "reference"`.
It is a separate operator since the decision must be recorded in the graph, also for the backward,
which is compiled and run later, when the configuration may have changed.

`torch.library.Library.define` / `impl` are used directly since a call through them costs 1-2
microseconds, a call through `torch.library.custom_op` 7-9.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd.graph import increment_version

from kda_ops import _sharding, config
from kda_ops._checks import check_writable
from kda_ops._gradients import (
    Backward,
    Signature,
    backward_fake,
    differentiate,
    refuse_gradients,
    refuse_second_derivatives,
    vector_jacobian_product,
)
from kda_ops._library import (
    LIBRARY,
    REFERENCE_LIBRARY,
    Parameters,
    by_name,
    define,
    implement,
    lazy,
    name_of,
    refuse_fp64,
    tensors_at,
    with_roles,
)
from kda_ops._roles import Role
from kda_ops._saving import Saving, SavingForward


class Operator(NamedTuple):
    """The implementations of one operator; see `define_op`.

    `cpu` is the reference with its checks. `cuda` is the whole CUDA implementation; `launcher` is
    the part of it that a compiled graph contains. `backward` is None for an operator that writes.
    """

    op: Any
    schema: str
    parameters: Parameters
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: Callable[..., Any]
    cpu: Callable[..., Any]
    cuda: Callable[..., Any]
    check_values: Callable[..., None] | None
    backward: Backward | None
    saving: Saving | None = None


OPERATORS: dict[Any, Operator] = {}
REFERENCES: dict[Any, Any] = {}  # operator of `kda_ops` -> that of `kda_ops_reference`


def backward_of(op: Any) -> Any:
    """The operator that computes the gradient of `op`."""
    backward = OPERATORS[op].backward
    assert backward is not None, f"{op} has no gradient"
    return backward.op


def selected(op: Any) -> Any:
    """The operator that public functions call for `op`: `op` itself, or with `config.impl =
    "reference"` its definition on any device. Dynamo traces this and guards on the configuration.

    Raises:
        ValueError: `config.impl` is neither.
    """
    if config.impl == "auto":
        return op
    config.check_impl()
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_define_references)
    else:
        _define_references()
    return REFERENCES[op]


def activate_lowerings() -> None:
    """Installs the Inductor lowerings while something is being compiled (idempotent, cheap).

    On the first compile of a process Dynamo traces before Inductor is imported, and AOTAutograd
    computes its cache key before it calls a fake implementation again. Waiting for Inductor would
    leave our sources out of that key, so that a changed lowering would be served stale code. So any
    trace installs them; with another backend that loads Inductor needlessly, seconds, once.
    """
    if "torch._inductor.lowering" in sys.modules or TracingContext.try_get() is not None:
        from kda_ops import lowering

        lowering.install()


def lowering_module(name: str) -> Any:
    """`kda_ops.lowering.<name>`; the first import loads Inductor and takes seconds."""
    return importlib.import_module(f"kda_ops.lowering.{name}")


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: str,
    cuda_backward: str | None = None,
    saving: SavingForward | None = None,
    roles: Mapping[str, Role] | None = None,
    check_values: Callable[..., None] | None = None,
    moves_only: bool = False,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Registers one operator and returns its `OpOverload`.

    Args:
        schema: The operator's schema without a namespace, such as
            `"gate(Tensor x, Tensor? A_log) -> Tensor"`: every argument positional and without a
            default. Written arguments are marked `(a!)`.
        reference: The definition in eager PyTorch, called with the schema's arguments in order. It
            is the CPU implementation and the source of gradients. It never returns an input or a
            view of one.
        fake: Shapes, dtypes and strides of the result. Like the launcher and `check_values` it
            declares only the parameters it uses, named as in the schema, in any order.
        cuda: `"module:function"` of the kernel launcher.
        cuda_backward: `"module:function"` of the launcher of the gradient's CUDA kernels, instead
            of the vector-Jacobian product of the reference. Like `cuda` it declares the arguments
            it uses, which include `output_gradients` (a list, one per result, None where there is
            none) and `needs_gradient` (a bool per argument of the schema). It returns the list of
            the needed gradients in the order of the arguments: dense, none of them an input or a
            view of one. Its fake implementation follows from the schema: a gradient has the shape
            of its argument. In compiled graphs it is one opaque call unless `lowering` inlines it.
        saving: A second forward for CUDA, which saves for its gradient what that would otherwise
            compute again.
        roles: Roles of arguments, by name: pages, slots, offsets, chunk tables, copies. Autotuning
            generates arguments accordingly; integers without a role are ones.
        check_values: Raises `ValueError` for bad tensor *values*. Called before the implementation,
            always for CPU tensors, for CUDA tensors with `kda_ops.config.check_values`.
        moves_only: Whether the kernel only copies elements, so that fp64 is a dtype like any other.
            All other operators reject fp64 on a GPU, also while they are traced.
        tags: Extra operator tags.
    """
    name = schema[: schema.index("(")]
    op = define(schema, tags)
    names = [x.name for x in op._schema.arguments]
    written = [i for i, x in enumerate(op._schema.arguments) if x.is_write]
    tensors = [i for i, x in enumerate(op._schema.arguments) if "Tensor" in str(x.type)]
    changed = tensors_at(op, written)
    parameters = with_roles(op, roles or {})
    load = lazy(cuda, parameters)
    fake = by_name(fake, names)
    if check_values is not None:
        check_values = by_name(check_values, names)

    def launcher(*args: Any) -> Any:
        if not moves_only:
            refuse_fp64(names, tensors, args)
        return load(*args)

    def cpu_impl(*args: Any) -> Any:
        if written:
            check_writable(**{names[i]: args[i] for i in written})
        if check_values is not None:
            check_values(*args)
        return reference(*args)

    def cuda_impl(*args: Any) -> Any:
        if check_values is not None and config.check_values:
            check_values(*args)
        result = launcher(*args)
        if written:  # PyTorch does not see what a kernel writes
            increment_version(changed(args))
        return result

    def fake_impl(*args: Any) -> Any:
        activate_lowerings()
        _sharding.activate(op, backward and backward.op)
        if not moves_only and any(isinstance(x, Tensor) and x.is_cuda for x in args):
            refuse_fp64(names, tensors, args)
        return fake(*args)

    implement(LIBRARY, op, cpu_impl, cuda_impl, fake_impl)
    saves = None
    if written:
        refuse_gradients(LIBRARY, name, op)
        backward = None
    else:
        if saving is not None:
            saves = Saving(
                schema, Signature(op), saving, reference, fake, parameters, activate_lowerings
            )
        backward = _define_backward(
            LIBRARY, schema, op, reference, cuda_backward, parameters, saves
        )
    OPERATORS[op] = Operator(
        op,
        schema,
        parameters,
        reference,
        fake,
        launcher,
        cpu_impl,
        cuda_impl,
        check_values,
        backward,
        saves,
    )
    return op


def _define_references(*_: Any) -> None:
    """Registers the missing operators of `torch.ops.kda_ops_reference`, on first use, since that
    takes as long as the whole import may take. (Dynamo passes what it knows of the call.)
    """
    for op, operator in OPERATORS.items():
        if op not in REFERENCES:
            REFERENCES[op] = _define_reference(op, operator)


def _define_reference(op: Any, operator: Operator) -> Any:
    """The operator whose implementation is the reference of another one, on every device.

    It takes fp64 on a GPU and checks tensor values there too, as a reference reads them anyway.
    """

    def fake_impl(*args: Any) -> Any:
        activate_lowerings()
        _sharding.activate(twin, backward and backward.op)
        return operator.fake(*args)

    backward = None
    twin = define(operator.schema, tuple(op.tags), REFERENCE_LIBRARY)
    implement(REFERENCE_LIBRARY, twin, operator.cpu, operator.cpu, fake_impl)
    if operator.backward is None:
        refuse_gradients(REFERENCE_LIBRARY, name_of(twin), twin)
    else:
        backward = _define_backward(
            REFERENCE_LIBRARY, operator.schema, twin, operator.reference, None, {}
        )
    return twin


def _define_backward(
    library: torch.library.Library,
    schema: str,
    op: Any,
    reference: Callable[..., Any],
    cuda: str | None,
    parameters: Parameters,
    saving: Saving | None = None,
) -> Backward:
    """Registers `<name>_backward` and makes it the operator's gradient."""
    signature = Signature(op)
    backward_op = define(signature.backward_schema(schema), library=library)
    product = vector_jacobian_product(reference, signature)
    launcher = (
        None if cuda is None else _backward_launcher(cuda, backward_op, signature, parameters)
    )
    fake = backward_fake(signature)

    def fake_impl(*args: Any) -> Any:  # compiled autograd traces it without the forward
        activate_lowerings()
        return fake(*args)

    implement(library, backward_op, product, launcher or product, fake_impl)
    refuse_second_derivatives(library, name_of(backward_op), backward_op)
    differentiate(library, name_of(op), op, signature, backward_op, saving)
    return Backward(backward_op, product, fake, launcher)


def _backward_launcher(
    target: str, op: Any, signature: Signature, parameters: Parameters
) -> Callable[..., Any]:
    """The launcher of a gradient's kernels, called like the backward operator."""
    load = lazy(target, {**parameters, "output_gradients": None, "needs_gradient": None})
    names = [x.name for x in op._schema.arguments]
    tensors = [i for i, x in enumerate(op._schema.arguments) if "Tensor" in str(x.type)]

    def launcher(*args: Any) -> Any:
        refuse_fp64(names, tensors, args)
        inputs, output_gradients, needs = signature.split(args)
        return signature.gradients(args, load(*inputs, output_gradients, needs))

    return launcher

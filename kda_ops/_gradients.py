"""What autograd makes of an operator: a functional one has a gradient, all else is refused.

* A functional operator differentiates through an operator of its own, `<name>_backward`, which is
  opaque to the compiler: a compiled backward graph has one call per operator.
* An operator that writes to an argument refuses arguments that require grad.
* Second derivatives and derivatives in forward mode are refused where they would be computed.
  Autograd takes an operator without a rule for a constant, so the answer would be zeros.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

BELOW_AUTOGRAD = torch._C._after_autograd_keyset
AUTOGRAD_KEYS = [
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
    torch._C.DispatchKey.ADInplaceOrView,
]
TABLES = ("cu_seqlens", "chunk_indices")  # integers, which have no gradient


class Backward(NamedTuple):
    """What stands behind one `<name>_backward`.

    The operator takes the forward's arguments, a gradient per output (None where the output was not
    used; one list of them where the forward returns a list) and `needs_gradient`, a bool per
    argument of the forward. It returns a gradient per tensor argument, `TABLES` left out; that of
    an argument that needs none is empty and costs nothing. `reference`, `fake` and `launcher` are
    called like the operator.

    Attributes:
        op: The operator.
        reference: The vector-Jacobian product of the forward's reference.
        fake: Shapes and dtypes of the gradients.
        launcher: The hand-written kernels, or None.
    """

    op: Any
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: Callable[..., Any] | None


class Signature:
    """The arguments and results of a forward operator, as its backward sees them."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.arguments = [x.name for x in op._schema.arguments]
        types = [str(x.type) for x in op._schema.arguments]
        self.tensors = [i for i, kind in enumerate(types) if kind in ("Tensor", "Optional[Tensor]")]
        self.wanted = [i for i in self.tensors if self.arguments[i] not in TABLES]
        results = [str(x.type) for x in op._schema.returns]
        self.returns_list = results == ["List[Tensor]"]
        self.results = len(results)

    def backward_schema(self, schema: str) -> str:
        """The schema of the backward of the operator with that schema."""
        name = schema[: schema.index("(")].replace(".", "_") + "_backward"
        inputs = schema[schema.index("(") + 1 : schema.rindex(") ->")]
        if self.returns_list:
            gradients = "Tensor?[] output_gradients"
        else:
            gradients = ", ".join(f"Tensor? output_gradient_{i}" for i in range(self.results))
        results = ", ".join(["Tensor"] * len(self.wanted))
        return f"{name}({inputs}, {gradients}, bool[] needs_gradient) -> ({results})"

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Tensor | None], list[bool]]:
        """The forward's arguments, the gradients of its results, and which are needed."""
        inputs, gradients = args[: len(self.arguments)], args[len(self.arguments) : -1]
        return list(inputs), list(gradients[0] if self.returns_list else gradients), args[-1]

    def gradients(self, args: Sequence[Any], found: Sequence[Tensor]) -> Any:
        """The results of the backward operator from those of its gradients that are needed."""
        first = next(x for x in args if isinstance(x, Tensor))
        needs, needed = args[-1], iter(found)
        results = tuple(next(needed) if needs[i] else first.new_empty(0) for i in self.wanted)
        return results[0] if len(results) == 1 else results


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_place_error(what: str, which: str) -> RuntimeError:
    """The refusal to differentiate what writes a state."""
    return RuntimeError(
        f"{what} writes its state in place and has no gradient, but {which}; call it under "
        "torch.no_grad() or torch.inference_mode()"
    )


def refuse_derivatives(what: str, inputs: Mapping[str, Tensor | None]) -> None:
    """Raises for inputs of a step in place that ask for a derivative: what its operators do, before
    the first of them writes.
    """
    for name, x in inputs.items():
        if x is None:
            continue
        if torch.is_grad_enabled() and x.requires_grad:
            raise in_place_error(what, f"{name} requires grad")
        if forward_ad._current_level >= 0 and has_tangent(x):
            raise forward_mode_error(what, name)


def refuse_gradients(library: torch.library.Library, name: str, op: Any) -> None:
    """Registers what autograd makes of an operator that writes to an argument."""
    names = [x.name for x in op._schema.arguments]
    tensors = Signature(op).tensors
    lists = [i for i, x in enumerate(op._schema.arguments) if "Tensor]" in str(x.type)]
    lists = [i for i in lists if i not in tensors]

    def autograd_impl(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for i in tensors:
                x = args[i]
                if x is not None and x.requires_grad:
                    raise in_place_error(op.name(), f"argument {names[i]} requires grad")
            for i in lists:
                if any(x is not None and x.requires_grad for x in args[i]):
                    raise in_place_error(op.name(), f"argument {names[i]} requires grad")
        if forward_ad._current_level >= 0:
            refuse_tangents(op, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & BELOW_AUTOGRAD, *args)

    library.impl(name, autograd_impl, "Autograd", with_keyset=True)


def differentiate(
    library: torch.library.Library,
    name: str,
    op: Any,
    signature: Signature,
    backward_op: Any,
    saving: Any = None,
) -> None:
    """Makes `backward_op` the gradient of a functional operator, or with `saving`
    (`kda_ops._saving.Saving`) where that applies the gradient of its forward.
    """
    tensors, wanted, returns_list = signature.tensors, signature.wanted, signature.returns_list
    count = len(signature.arguments)

    @cache  # PyTorch takes as long to make it as to register an operator
    def differentiable() -> type[Function]:
        class Differentiable(Function):
            @staticmethod
            def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
                ctx.set_materialize_grads(False)
                ctx.others = [None if isinstance(x, Tensor) else x for x in args]
                saved: dict[str, Tensor] = {}
                saves = saving is not None and saving.applies_eagerly(args)
                with torch._C._AutoDispatchBelowAutograd():
                    if saves:
                        result, saved = saving.split_results(saving.forward.op(*args))
                    else:
                        result = op.redispatch(keyset & BELOW_AUTOGRAD, *args)
                ctx.save_for_backward(*[args[i] for i in tensors], *saved.values())
                if isinstance(result, Tensor):
                    return without_base(result)
                return tuple(map(without_base, result))

            @staticmethod
            def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
                inputs = list(ctx.others)
                kept = ctx.saved_tensors  # once: a checkpoint computes them for each time
                given, saved = kept[: len(tensors)], kept[len(tensors) :]
                for i, x in zip(tensors, given, strict=True):
                    inputs[i] = x
                needs = [i in wanted and ctx.needs_input_grad[i + 1] for i in range(count)]
                if returns_list:
                    output_gradients = (list(output_gradients),)
                called = saving.backward.op if saved else backward_op
                found = called(*inputs, *saved, *output_gradients, needs)
                gradients: list[Tensor | None] = [None] * (count + 1)
                for i, x in zip(wanted, (found,) if len(wanted) == 1 else found, strict=True):
                    gradients[i + 1] = x if needs[i] else None
                return tuple(gradients)

        Differentiable.__name__ = name.replace(".", "_")
        return Differentiable

    def autograd_impl(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(op, args)
        if torch.is_grad_enabled():
            for i in tensors:
                x = args[i]
                if x is not None and x.requires_grad:
                    refuse_transforms(op)
                    result = differentiable().apply(keyset, *args)
                    return list(result) if returns_list else result
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & BELOW_AUTOGRAD, *args)

    library.impl(name, autograd_impl, "Autograd", with_keyset=True)


def without_base(x: Tensor) -> Tensor:
    """The same memory as a tensor of its own. Definitions end in views, and what a function of
    autograd returns as a view cannot be written in place.
    """
    if type(x) is not Tensor or not x._is_view():
        return x
    own = torch.empty(0, dtype=x.dtype, device=x.device)
    return own.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def refuse_second_derivatives(library: torch.library.Library, name: str, op: Any) -> None:
    """Lets a backward operator be part of a graph of gradients, and refuse to be differentiated."""

    @cache
    def once() -> type[Function]:
        class Once(Function):
            @staticmethod
            def forward(ctx: Any, call: Callable[[], Any], *tensors: Tensor) -> Any:
                return call()

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise RuntimeError(
                    f"{op.name()} has no derivative: operators of kda_ops have "
                    "no second derivatives"
                )

        Once.__name__ = name
        return Once

    def autograd_impl(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(op, args)

        def call() -> Any:  # not below autograd, with which a reference is differentiated
            return op.redispatch(keyset & BELOW_AUTOGRAD, *args)

        if torch.is_grad_enabled():
            required = [x for _, x in named_tensors(op, args) if x.requires_grad]
            if required:
                return once().apply(call, *required)
        return call()

    library.impl(name, autograd_impl, "Autograd", with_keyset=True)


def refuse_transforms(op: Any) -> None:
    """Raises in a functorch transform that differentiates backwards; `vmap` alone is none."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op.name()} has no gradient under torch.func (grad, vjp, jacrev): take it by "
            "torch.autograd.grad or backward()"
        )


def refuse_tangents(op: Any, args: Sequence[Any]) -> None:
    """Raises for arguments that carry a derivative in forward mode."""
    for name, x in named_tensors(op, args):
        if has_tangent(x):
            raise forward_mode_error(op.name(), f"argument {name}")


def forward_mode_error(what: str, which: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} has no derivative in forward mode (torch.func.jvp, jacfwd, "
        f"torch.autograd.forward_ad), but {which} has a tangent"
    )


def has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def named_tensors(op: Any, args: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a call, also those in lists, by the names of their arguments."""
    for argument, value in zip(op._schema.arguments, args, strict=True):
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, Tensor):
                yield argument.name, x


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records, also below it: under a `TorchDispatchMode` an operator is called there."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def vector_jacobian_product(
    reference: Callable[..., Any], signature: Signature
) -> Callable[..., Any]:
    """The gradients of a reference by autograd, called like the backward operator."""

    def product(*args: Any) -> Any:
        inputs, output_gradients, needs = signature.split(args)
        with recording():
            inputs = [
                x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
                for x, need in zip(inputs, needs, strict=True)
            ]
            outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [
            (o, g.to(o.dtype))
            for o, g in zip(outputs, output_gradients, strict=True)
            if g is not None and o.requires_grad
        ]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            products, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(products, wanted, weights, allow_unused=True)
        taken = {_storage(x) for x in (*inputs, *output_gradients) if isinstance(x, Tensor)}
        gradients = []
        for x, g in zip(wanted, found, strict=True):
            g = x.new_zeros(x.shape) if g is None else g.contiguous()
            # that of a sum is one tensor for both terms, those of a concatenation are parts of one
            if _storage(g) in taken or g.untyped_storage().nbytes() != g.nbytes:
                g = g.clone()
            taken.add(_storage(g))
            gradients.append(g)
        return signature.gradients(args, gradients)

    return product


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def backward_fake(signature: Signature) -> Callable[..., Any]:
    """Dense gradients of the shapes and dtypes of what they belong to."""

    def fake(*args: Any) -> Any:
        inputs, _, needs = signature.split(args)
        needed = [
            torch.empty(inputs[i].shape, dtype=inputs[i].dtype, device=inputs[i].device)
            for i in signature.wanted
            if needs[i]
        ]
        return signature.gradients(args, needed)

    return fake

"""A second forward of an operator, which saves for its gradient what that would compute again.

It is an operator `<name>_saving`, with the results of the first and what it saves, and its gradient
`<name>_saved_backward` takes that behind the arguments of the forward. Eager code calls it on a GPU
where a gradient will be taken; in compiled code the joint graph's two calls are exchanged
(`kda_ops.lowering.rewrites.save_chunks`). On a CPU, which saves nothing, both are the reference.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops import config
from kda_ops._gradients import (
    Signature,
    backward_fake,
    refuse_second_derivatives,
    vector_jacobian_product,
)
from kda_ops._library import LIBRARY, Parameters, by_name, define, implement, lazy, refuse_fp64


class SavingForward(NamedTuple):
    """What `define_op` is told.

    Attributes:
        saved: Names of what is saved, all tensors.
        launcher: `"module:function"`, called like that of the operator; it returns the results and
            what is saved.
        backward: `"module:function"`, called like that of the gradient, which also takes what is
            kept and saved, by these names.
        fake: What is saved, by the operator's arguments.
        size: Bytes of that, by the same; None where this forward can not be run.
        kept: Names of results, the first ones, that the gradient takes too.
    """

    saved: tuple[str, ...]
    launcher: str
    backward: str
    fake: Callable[..., tuple[Tensor, ...]]
    size: Callable[..., int | None]
    kept: tuple[str, ...] = ()


class Launched(NamedTuple):
    """An operator and its launcher, which a compiled graph contains."""

    op: Any
    launcher: Callable[..., Any]


class Saving:
    """The two operators of one, which are registered when they are first used: that takes time of
    which the import has none to spare.

    Attributes:
        results: How many results the operator itself has.
    """

    def __init__(
        self,
        schema: str,
        signature: Signature,
        told: SavingForward,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        parameters: Parameters,
        activate: Callable[[], None],
    ) -> None:
        self.results, self._taken = signature.results, (*told.kept, *told.saved)
        self._schema, self._signature, self._told = schema, signature, told
        self._reference, self._plain_fake, self._parameters = reference, fake, parameters
        self._activate = activate
        self._given = len(signature.arguments)

    @cached_property
    def _fake(self) -> Callable[..., tuple[Tensor, ...]]:
        return by_name(self._told.fake, self._signature.arguments)

    @cached_property
    def _size(self) -> Callable[..., int | None]:
        return by_name(self._told.size, self._signature.arguments)

    @cached_property
    def _parts(self) -> tuple[str, str, str]:
        """The schema's name and arguments, and what the gradient's has behind them."""
        schema = self._schema
        inputs = schema[schema.index("(") + 1 : schema.rindex(") ->")]
        backward = self._signature.backward_schema(schema)
        rest = backward[backward.index(inputs) + len(inputs) :]
        return schema[: schema.index("(")], inputs, rest

    @cached_property
    def forward(self) -> Launched:
        """With the results of the operator, and what is saved."""
        name, inputs, _ = self._parts
        results = ", ".join(["Tensor"] * (self.results + len(self._told.saved)))
        op = define(f"{name}_saving({inputs}) -> ({results})")
        launch = lazy(self._told.launcher, self._parameters)
        signature = self._signature

        def cpu(*args: Any) -> Any:
            return (*self._reference(*args), *map(torch.zeros_like, self._fake(*args)))

        def launcher(*args: Any) -> Any:
            refuse_fp64(signature.arguments, signature.tensors, args)
            return launch(*args)

        def fake(*args: Any) -> Any:
            self._activate()
            return (*self._plain_fake(*args), *self._fake(*args))

        implement(LIBRARY, op, cpu, launcher, fake)
        return Launched(op, launcher)

    @cached_property
    def backward(self) -> Launched:
        """The gradient of that."""
        name, inputs, rest = self._parts
        name = f"{name}_saved_backward"
        tensors = ", ".join(f"Tensor {x}" for x in self._taken)
        op = define(f"{name}({inputs}, {tensors}{rest}")
        given = {**self._parameters, **dict.fromkeys(self._taken)}
        given |= {"output_gradients": None, "needs_gradient": None}
        load = lazy(self._told.backward, given)
        signature = self._signature
        product = vector_jacobian_product(self._reference, signature)
        gradients_fake = backward_fake(signature)

        def plain_fake(*args: Any) -> Any:  # compiled autograd traces it without the forward
            self._activate()
            return gradients_fake(*args)

        def without_saved(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                inputs, _, rest = self._split(args)
                return function(*inputs, *rest)

            return call

        def launcher(*args: Any) -> Any:
            inputs, saved, rest = self._split(args)
            plain = (*inputs, *rest)
            _, output_gradients, needs = signature.split(plain)
            found = load(*inputs, *saved, output_gradients, needs)
            return signature.gradients(plain, found)

        implement(LIBRARY, op, without_saved(product), launcher, without_saved(plain_fake))
        refuse_second_derivatives(LIBRARY, name, op)
        return Launched(op, launcher)

    def split_results(self, found: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Of what the forward returns the results, and what the gradient takes, by its names."""
        taken = (*found[: len(self._told.kept)], *found[self.results :])
        return found[: self.results], dict(zip(self._taken, taken, strict=True))

    def _split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """The forward's arguments, what was saved, and what the gradient is asked for."""
        end = self._given + len(self._taken)
        return args[: self._given], args[self._given : end], args[end:]

    def applies(self, args: Sequence[Any]) -> bool:
        """Whether to save for these arguments, of which one needs a gradient."""
        size = self._size(*args) if config.saved_bytes > 0 else None
        return size is not None and size <= config.saved_bytes

    def applies_eagerly(self, args: Sequence[Any]) -> bool:
        """`applies`, of tensors that are on a GPU and not being traced. Modes, such as that of
        selective checkpointing, know the operator itself.
        """
        first = args[0]
        plain = type(first) in (Tensor, torch.nn.Parameter)
        alone = torch._C._len_torch_dispatch_stack() == 0
        return plain and first.is_cuda and alone and self.applies(args)

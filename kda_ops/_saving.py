"""A second forward of an operator, which saves for its gradient what that would compute again.

It is an operator `<name>_saving`, with the results of the first and what it saves, and its gradient
`<name>_saved_backward` takes that behind the arguments of the forward. Eager code calls it on a GPU
where a gradient will be taken; in compiled code the joint graph's two calls are exchanged
(`kda_ops.lowering.rewrites.save_chunks`). On a CPU, which saves nothing, both are the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class SavingForward:
    """What `define_op` is told.

    Attributes:
        saved: Names of what is saved, all tensors.
        launcher: `"module:function"`, called like that of the operator; it returns the results and
            what is saved.
        backward: `"module:function"`, called like that of the gradient, which also takes what is
            saved, by these names.
        fake: What is saved, by the operator's arguments.
        size: Bytes of that, by the same; None where this forward can not be run.
    """

    saved: tuple[str, ...]
    launcher: str
    backward: str
    fake: Callable[..., tuple[Tensor, ...]]
    size: Callable[..., int | None]


@dataclass(frozen=True)
class Launched:
    """An operator and its launcher, which a compiled graph contains."""

    op: Any
    launcher: Callable[..., Any]


class Saving:
    """The two operators of one; `results` are those of the operator itself."""

    def __init__(
        self,
        schema: str,
        signature: Signature,
        forward: SavingForward,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        parameters: Parameters,
    ) -> None:
        self.results, self.saved = signature.results, len(forward.saved)
        self._signature, self._given = signature, len(signature.arguments)
        names = signature.arguments
        self._fake = by_name(forward.fake, names)
        self._size = by_name(forward.size, names)
        name = schema[: schema.index("(")]
        inputs = schema[schema.index("(") + 1 : schema.rindex(") ->")]
        results = ", ".join(["Tensor"] * (self.results + self.saved))
        tensors = ", ".join(f"Tensor {x}" for x in forward.saved)
        backward = signature.backward_schema(schema)
        gradients = backward[backward.index(inputs) + len(inputs) :]
        made = define(f"{name}_saving({inputs}) -> ({results})")
        backward_op = define(f"{name}_saved_backward({inputs}, {tensors}{gradients}")
        launch = lazy(forward.launcher, parameters)
        given = {**parameters, **dict.fromkeys(forward.saved)}
        given |= {"output_gradients": None, "needs_gradient": None}
        load = lazy(forward.backward, given)
        backward_fake_of = backward_fake(signature)

        product = vector_jacobian_product(reference, signature)

        def cpu(*args: Any) -> Any:
            return (*reference(*args), *map(torch.zeros_like, self._fake(*args)))

        def cpu_backward(*args: Any) -> Any:
            inputs, _, rest = self.split(args)
            return product(*inputs, *rest)

        def all_fake(*args: Any) -> Any:
            return (*fake(*args), *self._fake(*args))

        def launcher(*args: Any) -> Any:
            refuse_fp64(names, signature.tensors, args)
            return launch(*args)

        def backward_launcher(*args: Any) -> Any:
            inputs, saved, rest = self.split(args)
            plain = (*inputs, *rest)
            _, output_gradients, needs = signature.split(plain)
            found = load(*inputs, *saved, output_gradients, needs)
            return signature.gradients(plain, found)

        def fake_backward(*args: Any) -> Any:
            inputs, _, rest = self.split(args)
            return backward_fake_of(*inputs, *rest)

        implement(LIBRARY, made, cpu, launcher, all_fake)
        implement(LIBRARY, backward_op, cpu_backward, backward_launcher, fake_backward)
        refuse_second_derivatives(LIBRARY, f"{name}_saved_backward", backward_op)
        self.forward = Launched(made, launcher)
        self.backward = Launched(backward_op, backward_launcher)

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """The forward's arguments, what was saved, and what the gradient is asked for."""
        end = self._given + self.saved
        return args[: self._given], args[self._given : end], args[end:]

    def applies(self, args: Sequence[Any]) -> bool:
        """Whether to save for these arguments, of which one needs a gradient."""
        size = self._size(*args) if config.saved_bytes > 0 else None
        return size is not None and size <= config.saved_bytes

    def applies_eagerly(self, args: Sequence[Any]) -> bool:
        """`applies`, of tensors that are on a GPU and not being traced."""
        first = args[0]
        plain = type(first) in (Tensor, torch.nn.Parameter)
        return plain and first.is_cuda and self.applies(args)

"""Programs that copy states, step them and restore them: operators that write states, in small
sizes, and random programs of them.

States are dense here: a copy of one in padded pages has different strides, so no compiler replaces
it by the state.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from kda_ops.cache.state_copy.cases import copy_inputs
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.conv.short_conv_update.cases import short_conv_update_inputs
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.delta_rule.recurrent_kda.cases import recurrent_inputs
from tests.support.fake_cuda import cuda_code
from tests.support.generated import load
from tests.support.operators import NAMES, public_function
from tests.support.oracle import assert_close, tensors

Inputs = dict[str, Any]
States = tuple[Tensor, ...]
PAGES = 4
FUNCTIONS = {name: public_function(name) for name in NAMES}  # imported before anything is traced


@dataclass(frozen=True)
class Stepper:
    """An operator that writes states, and how its other arguments are made.

    Attributes:
        name: The operator.
        states: Names of the arguments that it writes.
        make: Its arguments on a device.
        layout: Layout of a convolution state, empty without one.
    """

    name: str
    states: tuple[str, ...]
    make: Callable[[torch.device], Inputs]
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.layout}" if self.layout else self.name

    def inputs(self, device: str) -> tuple[States, Inputs]:
        """The states, `PAGES` or more dense pages each, and the other arguments."""
        inputs = self.make(torch.device(device))
        states = tuple(inputs.pop(name).clone() for name in self.states)
        return states, inputs

    def __call__(self, states: States, inputs: Inputs) -> list[Tensor]:
        """One step; returns the results."""
        written = dict(zip(self.states, states, strict=True))
        return tensors(FUNCTIONS[self.name](**inputs, **written))


def recurrent(device: torch.device) -> Inputs:
    return recurrent_inputs(2, 1, 1, 1, 8, 8, torch.float32, device=device)


def chunk(device: torch.device) -> Inputs:
    inputs = chunk_kda_gated_inputs(
        device, T=5, K=16, V=16, dtype=torch.float32, norm=True, cu_seqlens=[0, 3, 5]
    )
    state = torch.randn(PAGES, 1, 16, 16, device=device)
    return inputs | {"state": state, "state_indices": torch.tensor([3, 1], device=device)}


def decode(layout: str) -> Callable[[torch.device], Inputs]:
    return lambda device: kda_decode_inputs(2, 1, 1, 16, 16, layout, torch.float32, device=device)


def conv_update(layout: str) -> Callable[[torch.device], Inputs]:
    return lambda device: short_conv_update_inputs(
        (2, 48), layout, (3, 1), dtype=torch.float32, num_slots=PAGES, device=device
    )


def conv(layout: str) -> Callable[[torch.device], Inputs]:
    return lambda device: short_conv_qkv_inputs(
        *(1, 5, 1, 16, 16, torch.float32),
        lengths=(3, 2),
        layout=layout,
        state_indices=(3, 1),
        initial=(1, 0),
        num_slots=PAGES,
        device=device,
    )


def copy(layout: str) -> Callable[[torch.device], Inputs]:
    plan = [(2, 2, 1, 0), (3, 3, 3, 1)]
    return lambda device: copy_inputs(
        plan,
        PAGES,
        4,
        16,
        (1, 8, 8),
        layout=layout,
        layers=None,
        dtype=torch.float32,
        device=device,
    )


RECURRENT = Stepper("recurrent_kda", ("state",), recurrent)
DECODES = [
    Stepper("kda_decode", ("conv_state", "state"), decode(layout), layout)
    for layout in ("SD", "DS")
]
STEPPERS = [
    RECURRENT,
    *DECODES,
    Stepper("chunk_kda_gated", ("state",), chunk),
    *(
        stepper
        for layout in ("SD", "DS")
        for stepper in (
            Stepper("short_conv_update", ("conv_state",), conv_update(layout), layout),
            Stepper("short_conv_qkv", ("conv_state",), conv(layout), layout),
            Stepper("state_copy", ("conv", "recurrent"), copy(layout), layout),
        )
    ),
]


def compare(
    program: Callable[..., list[Tensor]],
    states: Any,
    *args: Any,
    dynamic: bool = False,
    interpreted: bool = False,
) -> None:
    """Checks a compiled program against eager fp64 by the rule: its results, and the states it
    writes, its first argument.

    With `interpreted`, what is generated for a GPU is run, on CPU tensors in Triton's interpreter.
    """
    compiled = torch.compile(program, fullgraph=True, dynamic=dynamic)
    if interpreted:
        compiled = lambda *args: cuda_code(program, *args, dynamic=dynamic, load=load)[0]  # noqa: E731

    def run(function: Any, states: Any, args: Any) -> list[Tensor]:
        return [*function(states, *args), *tree_leaves(states)]

    with torch.no_grad():
        expected = run(program, tree_map(torch.clone, states), args)
        fp64 = run(program, *tree_map(double, (states, args)))
        found = run(compiled, states, args)
    for x, e, e64 in zip(found, expected, fp64, strict=True):
        assert_close(x, e, e64)


def double(x: Any) -> Any:
    """A CPU copy of a tensor, in fp64 if it is floating-point."""
    if not isinstance(x, Tensor):
        return x
    return x.cpu().double() if x.is_floating_point() else x.cpu()


@dataclass
class Program:
    """A random program over two states: those of one operator, or two of an operator with one.

    Attributes:
        stepper: The operator.
        lines: What it does in order: a name, and the places of what it does it with.
    """

    stepper: Stepper
    lines: list[tuple[Any, ...]]

    def __call__(self, states: list[States], inputs: Inputs) -> list[Tensor]:
        """Runs it on a tuple of states for each argument that the operator writes."""
        found = [list(family) for family in states]
        results: list[Tensor] = []
        for name, *places in self.lines:
            if name == "step":
                picked = tuple(family[i] for family, i in zip(found, places, strict=True))
                results += self.stepper(picked, inputs)
                continue
            family = found[places[0]]
            x, other = family[places[1]], family[places[2]]
            if name in MAKES:
                family.append(MAKES[name](x))
            elif name in READS:
                results.append(READS[name](x))
            else:
                WRITES[name](x, other)
        return results


def page(x: Tensor, other: Tensor) -> None:
    x[1] = other[1]


def shift(x: Tensor, other: Tensor) -> None:
    x[1:] = x[:-1].clone()


MAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "copy": lambda x: torch.empty_like(x).copy_(x),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "read": lambda x: x * 3,
    "scatter": lambda x: x.index_fill(0, torch.tensor([2], device=x.device), 0.5),
}
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "back": lambda x, other: x.copy_(other),
    "page": page,
    "where": lambda x, other: x.copy_(torch.where(other > 0, other, x)),
    "double": lambda x, other: x.mul_(2),
    "flip": lambda x, other: x.copy_(other.flip(0)),
    "roll": lambda x, other: x[1:].copy_(x.roll(1, 0)[1:]),
    "shift": shift,
}


def random_program(seed: int, length: int = 7) -> Program:
    """Begins with a copy, steps its source in the middle and restores some of it at the end."""
    draw = random.Random(seed)
    stepper = draw.choice([RECURRENT, RECURRENT, *DECODES])
    sizes = [2] if stepper is RECURRENT else [1, 1]
    family = draw.randrange(len(sizes))
    source, copied = draw.randrange(sizes[family]), sizes[family]
    lines: list[tuple[Any, ...]] = [(draw.choice([*MAKES]), family, source, source)]
    sizes[family] += 1
    while len(lines) < length - 1:
        name = draw.choice([*MAKES, *READS, *WRITES, "step", "step"])
        middle = len(lines) == length // 2
        if name == "step" or middle:
            places = [draw.randrange(size) for size in sizes]
            if middle:
                places[family] = source
            lines.append(("step", *places))
            continue
        f = draw.randrange(len(sizes))
        lines.append((name, f, draw.randrange(sizes[f]), draw.randrange(sizes[f])))
        sizes[f] += name in MAKES
    lines.append((draw.choice(["back", "page", "where"]), family, source, copied))
    return Program(stepper, lines)


def random_inputs(program: Program, device: str) -> tuple[list[States], Inputs]:
    """Two states for a program, and the other arguments of its operator."""
    states, inputs = program.stepper.inputs(device)
    if len(states) > 1:
        return [(x,) for x in states], inputs
    return [(states[0], torch.randn_like(states[0]))], inputs

"""How operators run on the shards of DTensors, so that a model of DTensors needs no gather for
them.

A rule writes an operator's tensors by their axes: `"q B T H K, A_log H -> B T H K"`. An axis in
upper case may be sharded: everything that has it is sharded along it, and everything else is whole
on every rank. An axis in lower case is needed whole. What a rule does not name is needed whole too.
The gradient of an argument is sharded like the argument; of one that does not have the axis each
rank has a term of a sum.

* `B` is sequences, or slots of pages. States in pages belong to all sequences of a step, so those
  operators are sharded by heads alone.
* `H` is heads, of keys and of values, where the ranks divide both; `D` is channels that do not mix.
* `...` is any number of axes, each of which may be sharded.
* `lD` is two axes of a convolution state: `l D` in layout SD, `D l` in DS.

Packed q | k | v (`kda_decode`, `short_conv_qkv`) has no axis of heads: shards of it mix q, k and v.
The overloads `.unpacked` have one.

A state that is written stays where it is. DTensor would write to a copy if it redistributed one, so
the other arguments follow the state, and what cannot follow is an error.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNKED = "q {b} t H k, k {b} t H k, v {b} t H v, "
_GATES = "{raw} {b} t H k, {beta} {b} t H, A_log H, dt_bias H, "
_QKV = (
    "q {b} t H, k {b} t H, v {b} t H, q_weight H w, k_weight H w, v_weight H w, "
    "q_bias H, k_bias H, v_bias H"
)
_QKV_OUT = " -> {b} t H k, {b} t H k, {b} t H"
_QKV_STATES = ", q_state s lH, k_state s lH, v_state s lH"
RULES = {
    "gate": "raw_gate ... H k, A_log H, dt_bias H -> ... H k",
    "chunk_cumsum": "g B t ... -> B t ...",
    "gate_cumsum": "raw_gate B t H k, A_log H, dt_bias H -> B t H k",
    "conv_split": "conv_state B x y -> B x y",
    "short_conv": "x B t D, weight D w, bias D -> B t D",
    "short_conv.state": "x b t D, weight D w, bias D, conv_state s lD -> b t D",
    "short_conv_update": "x *x D, weight D w, bias D, conv_state s lD -> *x D",
    "short_conv_qkv": "x B t d -> B t h k, B t h k, B t d",
    "short_conv_qkv.state": "x b t d -> b t h k, b t h k, b t d",
    "short_conv_qkv.unpacked": (_QKV + _QKV_OUT).format(b="B"),
    "short_conv_qkv.unpacked_state": (_QKV + _QKV_STATES + _QKV_OUT).format(b="b"),
    "l2norm": "x ... d -> ... d",
    "rms_norm_gated": "o ... d, output_gate ... d, weight d -> ... d",
    "chunk_kda": (
        _CHUNKED + "g_cumsum {b} t H k, beta {b} t H, initial_state {b} H v k "
        "-> {b} t H v, {b} H v k"
    ).format(b="B"),
    "chunk_kda.state": (
        _CHUNKED + "g_cumsum {b} t H k, beta {b} t H, state s H v k -> {b} t H v"
    ).format(b="b"),
    "chunk_kda_gated": (
        _CHUNKED + _GATES + "initial_state {b} H v k -> {b} t H v, {b} H v k"
    ).format(b="B", raw="raw_gate", beta="raw_beta"),
    "chunk_kda_gated.state": (_CHUNKED + _GATES + "state s H v k -> {b} t H v").format(
        b="b", raw="raw_gate", beta="raw_beta"
    ),
    "chunk_kda_gated_affine": (
        _CHUNKED + _GATES + "initial_state {b} H v k, entered {b} "
        "-> {b} t H v, {b} t H k, {b} H v k, {b} H k k"
    ).format(b="B", raw="raw_gate", beta="raw_beta"),
    "recurrent_kda": "q n t H k, k n t H k, v n t H v, g n t H k, beta n t H, state s H v k "
    "-> n t H v",
    "kda_decode": "x t d -> b t h v",
    "kda_decode.unpacked": (
        "q t H, k t H, v t H, q_state s lH, k_state s lH, v_state s lH, q_weight H w, "
        "k_weight H w, v_weight H w, q_bias H, k_bias H, v_bias H, raw_gate *f H k, "
        "raw_beta *f H, output_gate *f H v, A_log H, dt_bias H, state s H v k -> b t H v"
    ),
    "state_copy": "conv *c lH, recurrent *c H v k ->",
}


class Rule(NamedTuple):
    """A rule, taken apart: axes by argument, and of each result."""

    arguments: dict[str, list[str]]
    results: list[list[str]]


def parse(text: str) -> Rule:
    before, _, after = text.partition("->")
    arguments = {}
    for part in before.split(","):
        name, *axes = part.split()
        arguments[name] = axes
    return Rule(arguments, [part.split() for part in after.split(",") if part.strip()])


def expand(axes: Sequence[str], rank: int, layout: str | None) -> list[str]:
    """One name per axis of a tensor of that rank."""
    found: list[str] = []
    for axis in axes:
        if axis == "..." or axis.startswith("*"):
            # names that count from the left; those of `*` are needed whole
            lead = "." if axis == "..." else "*"
            rest = sum(2 if x.startswith("l") else 1 for x in axes) - 1
            found += [f"{lead}{i}" for i in range(rank - rest)]
        elif axis[0] == "l" and len(axis) == 2:
            found += ["l", axis[1]] if layout == "SD" else [axis[1], "l"]
        else:
            found.append(axis)
    return found[:rank]  # of a bias [HV * K] for [HV, K]


def shardable(axis: str) -> bool:
    return axis[0] == "." or axis.isupper()


_REGISTERED: set[Any] = set()


def activate(op: Any, backward_op: Any = None) -> None:
    """Registers the rules of an operator with DTensor, if that is loaded (idempotent, cheap).

    DTensor asks for the shapes of a result before it looks for a rule, so that the fake
    implementation of an operator is early enough.
    """
    if op in _REGISTERED or "torch.distributed.tensor" not in sys.modules:
        return
    _REGISTERED.add(op)
    name = op._schema.name.partition("::")[2]
    if op._schema.overload_name:
        name += f".{op._schema.overload_name}"
    if name not in RULES:  # DTensor then refuses the operator
        return
    register(op, parse(RULES[name]), None)
    if backward_op is not None:
        register(backward_op, parse(RULES[name]), [x.name for x in op._schema.arguments])


def register(op: Any, rule: Rule, forward: list[str] | None) -> None:
    """Registers the rule of an operator, or of the gradient of one with the arguments `forward`."""
    from torch.distributed.tensor.experimental import register_sharding

    def shardings(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        return Call(op, rule, forward, args).shardings()

    if [str(x.type) for x in op._schema.returns] == ["List[Tensor]"]:
        register_list(op, shardings)
    else:
        register_sharding(op)(shardings)


class Call:
    """One call of an operator with DTensors, of which each argument is a spec."""

    def __init__(
        self, op: Any, rule: Rule, forward: list[str] | None, args: tuple[Any, ...]
    ) -> None:
        self.op, self.rule, self.forward = op, rule, forward
        self.args = dict(zip((x.name for x in op._schema.arguments), args, strict=True))
        self.layout = self.args.get("layout")
        self.axes = {
            name: expand(axes, len(self.args[name].shape), self.layout)
            for name, axes in rule.arguments.items()
            if is_spec(self.args[name])
        }
        if forward is not None:
            self.axes |= self.axes_of_gradients()

    def axes_of_gradients(self) -> dict[str, list[str]]:
        """Of the gradients of results, by the names of a backward operator."""
        found = {}
        for i, axes in enumerate(self.rule.results):
            name = f"output_gradient_{i}"
            if is_spec(self.args.get(name)):
                found[name] = expand(axes, len(self.args[name].shape), self.layout)
        return found

    def shardings(self) -> list[tuple[list[Any], list[Any]]]:
        """Acceptable placements on one dimension of a mesh: of results, and of arguments."""
        written = [
            x.name for x in self.op._schema.arguments if x.is_write and is_spec(self.args[x.name])
        ]
        kept = {name: self.placement_of_state(name) for name in written}
        letters = {axis for axes in self.axes.values() for axis in axes if shardable(axis)}
        found = []
        for letter in (None, *sorted(letters)):
            if letter == "H" and not self.heads_divide():
                continue
            if any(
                self.placement(self.axes.get(name, ()), letter) != kept[name] for name in written
            ):
                continue
            found.append((self.results(letter), self.arguments(letter)))
        if not found:
            raise ValueError(
                f"{self.op.name()} writes {', '.join(written)}, which must be DTensors of one kind "
                f"of placement, whole or sharded by heads that the ranks divide, got {kept}"
            )
        return found

    def placement_of_state(self, name: str) -> Any:
        """The placement of an argument that is written, which cannot be moved."""
        placements = set(self.args[name].placements)
        if len(placements) != 1:
            raise ValueError(
                f"{name} is written by {self.op.name()}, so it must have one placement on all "
                f"dimensions of its mesh, got {self.args[name].placements}: use a mesh of one "
                "dimension"
            )
        return placements.pop()

    def heads_divide(self) -> bool:
        """Whether every rank gets whole heads, of values those of its keys."""
        ranks = next(x.mesh for x in self.args.values() if is_spec(x)).size()
        width = 1
        if "unpacked" in self.op.name():
            width = self.args.get("head_dim") or self.args["raw_gate"].shape[-1]
        for name, axes in self.axes.items():
            if "H" in axes:
                size = self.args[name].shape[axes.index("H")]
                # q and k of the unpacked overloads are channels
                if size % (ranks * (width if name[0] in "qk" else 1)):
                    return False
        return True

    def placement(self, axes: Sequence[str], letter: str | None) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        return Shard(axes.index(letter)) if letter in axes else Replicate()

    def arguments(self, letter: str | None) -> list[Any]:
        found: list[Any] = []
        for name, x in self.args.items():
            for each in x if isinstance(x, (tuple, list)) else (x,):
                axes = self.axes.get(name, ())
                if name == "output_gradients" and is_spec(each):
                    axes = expand(self.rule.results[0], len(each.shape), self.layout)
                found.append(self.placement(axes, letter) if is_spec(each) else None)
        return found

    def results(self, letter: str | None) -> list[Any]:
        from torch.distributed.tensor import Partial, Replicate

        if self.forward is None:
            return [
                Replicate()
                if axes == ["B", "H", "v", "k"] and not self.args.get("output_final_state", True)
                else self.placement(self.expanded_result(axes), letter)
                for axes in self.rule.results
            ]
        found = []
        for name, needed in zip(self.forward, self.args["needs_gradient"], strict=True):
            x = self.args[name]
            if not is_tensor(self.op, name) or name in ("cu_seqlens", "chunk_indices"):
                continue
            if not needed or not is_spec(x):
                found.append(Replicate())  # an empty tensor
            elif letter is None or letter in self.axes.get(name, ()):
                found.append(self.placement(self.axes.get(name, ()), letter))
            else:
                found.append(Partial())
        return found

    def expanded_result(self, axes: Sequence[str]) -> list[str]:
        """Axes of a result, whose free ones are those of the first argument."""
        if not any(x == "..." or x[0] == "*" for x in axes):
            return list(axes)
        first = next(iter(self.axes))
        return expand(axes, len(self.args[first].shape), self.layout)


def is_spec(x: Any) -> bool:
    return hasattr(x, "placements") and hasattr(x, "tensor_meta")


def is_tensor(op: Any, name: str) -> bool:
    argument = next(x for x in op._schema.arguments if x.name == name)
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def register_list(op: Any, shardings: Any) -> None:
    """What `register_sharding` does, for an operator whose result is a list, one for each size."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    def strategy(schema: Any) -> Any:
        args = [
            x.strategies[0].output_spec if isinstance(x, OpStrategy) else x
            for x in schema.args_schema
        ]
        count = len(args[1])
        lists = [[*(results * count), *arguments] for results, arguments in shardings(*args)]
        return expand_to_full_mesh_op_strategy(
            schema.get_mesh_from_args(), schema, lists, input_index=count
        )

    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        op, strategy, RuntimeSchemaInfo(1, needs_pytree=True)
    )

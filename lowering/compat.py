"""Every difference between the torch versions that this package supports (2.11 and newer), and
nothing else.
"""

from typing import Any

import torch
from torch._inductor.virtualized import V

from lowering.provenance import inherit


def inline_subgraph(gm: Any, inputs: list[Any]) -> Any:
    """Lowers the nodes of a traced graph in the place of the node that is being lowered.

    Unlike Inductor's own `process_subgraph_nodes` it leaves the results unrealised: Inductor writes
    what an output node uses to memory, and then the consumers of the operator could not fuse.
    """
    *_, output = gm.graph.nodes
    (result,) = output.args
    gm.graph.erase_node(output)
    arguments = iter(inputs)
    node, module = V.graph.current_node, V.graph.module
    V.graph.module = gm
    try:
        for inner in gm.graph.nodes:
            inherit(inner, node)
            V.graph.current_node = inner
            if inner.op == "placeholder":
                V.graph.env[inner] = next(arguments)
            elif inner.target is torch.ops.aten.empty.memory_format:
                V.graph.env[inner] = empty_like_traced(inner.meta["val"])
            else:
                V.graph.env[inner] = V.graph.run_node(inner)
    finally:
        V.graph.current_node, V.graph.module = node, module
    return torch.fx.node.map_arg(result, V.graph.env.__getitem__)


def empty_like_traced(x: torch.Tensor) -> Any:
    """An allocation with the strides that it was traced with.

    With a size such as `s0 - s1` those are in terms of `Max(1, s0 - s1)`. Inductor's own lowering
    leaves that out, takes the two for different layouts and copies what the graph returns.
    """
    from torch._inductor.lowering import empty_strided

    def expressions(sizes: Any) -> list[Any]:
        return [n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes]

    size, stride = expressions(x.shape), expressions(x.stride())
    return empty_strided(size, stride, dtype=x.dtype, device=x.device)


def size_hint(expression: Any) -> int:
    """The number that a symbolic size of the graph being lowered had when it was traced."""
    sizes = V.graph.sizevars
    hint = sizes.optimization_hint if hasattr(sizes, "optimization_hint") else sizes.size_hint
    return int(hint(expression, fallback=0))


def lower_storage_offset() -> None:
    """Gives `aten.sym_storage_offset` the lowering that Inductor lacks (pytorch issue 198068).

    With symbolic sizes the offset of a written view, such as one layer of a cache, is that node.
    Without a lowering Inductor evaluates it on a tensor that it has rebuilt at offset 0, and the
    operator silently writes to the wrong layer.
    """
    from torch._inductor import lowering

    op = torch.ops.aten.sym_storage_offset.default
    if op in lowering.lowerings and op not in lowering.fallbacks:
        return

    def storage_offset(x: Any) -> Any:
        offset = V.graph.current_node.meta["val"]
        return offset.node.expr if isinstance(offset, torch.SymInt) else offset

    lowering.fallbacks.discard(op)
    lowering.lowerings.pop(op, None)
    lowering.register_lowering(op, type_promotion_kind=None)(storage_offset)

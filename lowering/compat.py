"""Every difference between the torch versions that this package supports (2.11 and newer), and
nothing else.
"""

from typing import Any

from torch._inductor.virtualized import V


def inline_subgraph(gm: Any, inputs: list[Any]) -> Any:
    """Lowers the nodes of a traced graph in the place of the node that is being lowered."""
    from torch._inductor.codegen.subgraph import inline_subgraph_to_ir_nodes

    return inline_subgraph_to_ir_nodes(gm, inputs, V.graph.current_node.name)

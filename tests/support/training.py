"""What a training step is compiled to: the rewritten forward and backward graphs, run as they are
on CPU tensors, so that a wrong rewrite gives wrong gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx


@dataclass
class Training:
    """The graphs of one compiled function, in the order in which they were compiled.

    Attributes:
        graphs: Each forward and each backward graph.
        fired: Names of the rewrites that fired.
        refused: Name and reason of those that nearly fired.
    """

    graphs: list[fx.GraphModule] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def operators(self, graph: int) -> list[str]:
        """Names of the package's operators that a graph calls, in order."""
        targets = [node.target for node in self.graphs[graph].graph.nodes]
        return [str(t).split(".")[1] for t in targets if getattr(t, "namespace", "") == "kda_ops"]

    def saved(self, results: int) -> dict[str, Tensor]:
        """What the first graph returns for the backward, behind its results."""
        (output,) = self.graphs[0].graph.find_nodes(op="output")
        kept = [node for node in output.args[0][results:] if isinstance(node, fx.Node)]
        values = {node.name: node.meta["val"] for node in kept}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}


def trained(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Training]:
    """`torch.compile(function, fullgraph=True)` up to code generation, and what it leaves behind
    as it is called.
    """
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    from kda_ops.lowering.rewrites.framework import recording

    found = Training()

    def inner_compile(gm: Any, inputs: Any, **_: Any) -> Any:
        found.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: Any, inputs: Any) -> Any:
        with recording() as outcomes:
            compiled = compile_fx(gm, inputs, inner_compile=inner_compile)
        found.fired += [o.rewrite for o in outcomes if o.reason is None]
        found.refused += [(o.rewrite, o.reason) for o in outcomes if o.reason]
        return compiled

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._inductor.config.patch(force_disable_caches=True):
            return compiled(*args, **kwargs)

    return call, found

"""What a compiled function consists of, as code."""

from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


class Graphs:
    """A backend that keeps the code of the graphs, forward and backward, and runs them."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, inputs)

    def keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.code.append(graph.code)
        return make_boxed_func(graph.forward)

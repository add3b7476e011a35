"""The result of the graph rewrites on a function: the rewritten graph, run on CPU tensors.

`torch.compile` up to the end of Inductor's post-grad passes, without code generation. The graph is
then run as it is, so a wrong rewrite gives wrong numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.virtualized import V

from tests.support.oracle import assert_close, tensors

COPIES = (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)


@dataclass(frozen=True)
class Rewritten:
    """One rewritten graph.

    Attributes:
        operators: Names of the package's operators that it calls, in order.
        fired: Names of the rewrites that fired.
        refused: Name and reason of those that nearly fired.
        copies: Calls that copy a tensor.
    """

    operators: list[str]
    fired: list[str]
    refused: list[tuple[str, str]]
    copies: int


def rewritten(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool | dict[int, int] = False,
    written: tuple[int, ...] = (),
    frozen: bool = False,
) -> Rewritten:
    """Compiles and runs `function`, and checks the result against eager fp64 by the rule.

    Args:
        function: Written like a model: small operators and plain PyTorch.
        args: Its arguments.
        dynamic: Whether all sizes are symbolic, or the symbolic axis of arguments by position.
        written: Positions of the arguments that it writes; they are compared too.
        frozen: Compile with Inductor's freezing: the parameters of a module are constants.
    """
    import torch._inductor.lowering
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx, fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import post_grad_passes

    from kda_ops.lowering.rewrites.framework import recording

    graphs: list[Any] = []

    def inner_compile(gm: Any, inputs: Any, **_: Any) -> Any:
        with V.set_fake_mode(fake_tensor_prop(gm, inputs, frozen)):
            post_grad_passes(gm, is_inference=True)
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_fx(gm, inputs, inner_compile=inner_compile)

    torch._dynamo.reset()
    if isinstance(dynamic, dict):
        for position, axis in dynamic.items():
            torch._dynamo.mark_dynamic(args[position], axis)
    sizes = None if isinstance(dynamic, dict) else dynamic
    settings: dict[str, Any] = {"force_disable_caches": True, "freezing": frozen}
    if frozen:  # as on a GPU: GEMMs merged, not replaced by oneDNN's
        settings |= {"cpp.weight_prepack": False, "cpp.enable_concat_linear": True}
    patched = torch._inductor.config.patch(settings)
    with torch.no_grad(), patched, recording() as outcomes:
        compiled = torch.compile(function, backend=backend, dynamic=sizes, fullgraph=True)
        results = run(compiled, args, written)
        expected = run(function, args, written)
        fp64 = run(function, tuple(map(double, args)), written)
    for r, e, e64 in zip(results, expected, fp64, strict=True):
        assert_close(r, e, e64)
        assert r.stride() == e.stride()
    (gm,) = graphs
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    calls = [node for node in gm.graph.nodes if node.target in COPIES]
    return Rewritten(
        [str(t).split(".")[1] for t in targets if getattr(t, "namespace", "") == "kda_ops"],
        [outcome.rewrite for outcome in outcomes if outcome.reason is None],
        [(outcome.rewrite, outcome.reason) for outcome in outcomes if outcome.reason],
        # what was written in place ends as a copy of an input to itself
        sum(node.args[0] is not node.args[1] for node in calls if len(node.args) > 1)
        + sum(len(node.args) == 1 for node in calls),
    )


def run(function: Callable[..., Any], args: tuple[Any, ...], written: tuple[int, ...]) -> Any:
    """The results of a call on copies of what it writes, and what it wrote."""
    args = tuple(x.clone() if i in written else x for i, x in enumerate(args))
    return [*tensors(function(*args)), *(args[i] for i in written)]


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

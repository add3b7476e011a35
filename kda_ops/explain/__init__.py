"""`explain`: what the graph rewrites change in a model, layer by layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kda_ops._registry import lowering_module

if TYPE_CHECKING:  # its dataclasses are a tenth of what importing this package takes
    from kda_ops.explain.result import Explanation

__all__ = ["explain"]


def explain(
    model: Callable[..., Any], /, *args: Any, dynamic: bool = False, **kwargs: Any
) -> "Explanation":
    """Explains how `torch.compile(model, fullgraph=True)` compiles `model(*args, **kwargs)`.

    The model is traced once, in the caller's grad mode, and its graph is compiled twice, without
    and with this package's graph rewrites, down to the generated source. Only the forward graph is
    covered, not the backward or the optimizer. Nothing is run: no result is computed, no state is
    written, and code compiled before is unaffected.

    If a parameter, buffer or argument is on a CUDA device, code is generated for that device. Else
    it is generated for a virtual H200, from the graph traced on the CPU: where a model or PyTorch
    branches on the device, it takes the branch of the CPU. If no code can be generated, the
    explanation says why, and still reports the rewrites.

    Args:
        model: A module or function that compiles as one graph.
        args: Its arguments.
        dynamic: Whether sizes are symbolic, as in `torch.compile(model, dynamic=True)`. Byte counts
            then use the sizes of this call. (An argument of the model that is itself named
            `dynamic` cannot be passed by name.)
        kwargs: Its keyword arguments.

    Returns:
        An `Explanation`: per layer the rewrites that fired and those that nearly fired, kernels,
        launches, other calls and bytes of intermediates, before and after. `str()` gives a report,
        `.to_html()` a page with drawings of the graphs. A layer is a module that calls a
        recurrence, with everything inside it; a kernel is attributed to the layer of most of its
        operations.

    Raises:
        ValueError: `model` is not callable, or there is nothing to compile.
        torch._dynamo.exc.TorchDynamoException: The model does not compile as one graph.
    """
    if not callable(model):
        raise ValueError(f"model must be a module or a function, got {type(model).__name__}")
    return lowering_module("explain.compilation").explain(model, args, kwargs, dynamic=dynamic)

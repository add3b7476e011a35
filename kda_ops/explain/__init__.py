"""`explain`: what the graph rewrites make of a model, layer by layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kda_ops._registry import lowering_module

if TYPE_CHECKING:  # its dataclasses are a tenth of what importing this package takes
    from kda_ops.explain.result import Explanation

__all__ = ["explain"]


def explain(
    model: Callable[..., Any], /, *args: Any, dynamic: bool = False, **kwargs: Any
) -> "Explanation":
    """Says what `torch.compile(model, fullgraph=True)` makes of `model(*args, **kwargs)`.

    The model is traced once, in the caller's grad mode, and its graph compiled twice, without and
    with this package's graph rewrites, as far as the generated source; the code outside of a
    compiled forward graph (backward, optimiser) is not looked at. Nothing is run: no result is
    computed, no state is written, and code that was compiled before stays as it is.

    Where a parameter, buffer or argument is on a CUDA device, code is generated for that device.
    Else it is generated for an H200 that need not be there, from the graph that is traced on the
    CPU: what a model or PyTorch itself decides by device is decided for the CPU. If no code can be
    generated, the explanation says why and what the rewrites made of the graph.

    Args:
        model: A module or function that compiles as one graph.
        args: Its arguments.
        dynamic: Whether sizes are symbolic, as in `torch.compile(model, dynamic=True)`. A size of
            bytes then counts with the number that it has in this call. (An argument of the model
            that is itself named `dynamic` cannot be passed by name.)
        kwargs: Its keyword arguments.

    Returns:
        An `Explanation`: per layer the rewrites that fired and those that nearly fired, kernels,
        launches, other calls and bytes of intermediate results, before and after. `str()` of it
        is a report, `.to_html()` a page with the graphs drawn. A layer is a module that calls a
        recurrence, with all that is inside of it; a kernel counts for the layer that most of its
        operations are in.

    Raises:
        ValueError: `model` is not callable, or there is nothing to compile.
        torch._dynamo.exc.TorchDynamoException: The model does not compile as one graph.
    """
    if not callable(model):
        raise ValueError(f"model must be a module or a function, got {type(model).__name__}")
    return lowering_module("explain.compilation").explain(model, args, kwargs, dynamic=dynamic)

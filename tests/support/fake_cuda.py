"""The code Inductor would generate for a CUDA device, on a machine without one.

`cuda_code(f, *cpu_args)` compiles `f` on CPU tensors as usual: Dynamo and AOTAutograd never see a
GPU. At the end, where Inductor receives the ATen graph, a copy of it is compiled for a virtual GPU
(`kda_ops.lowering.explain.virtual_gpu`). The generated source is kept instead of run; the call
itself runs the CPU graph. So launches can be counted in CPU CI, static and
dynamic, forward and backward.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config

from kda_ops.lowering.explain.generated_code import Summary, summary
from kda_ops.lowering.explain.virtual_gpu import described_device, described_driver, on_cuda

__all__ = ["REINDEXES", "Summary", "captured", "cuda_code", "summary"]

# Inductor fuses a reduction with pointwise work on its result in another shape; torch 2.11 does not
REINDEXES = hasattr(torch._inductor.config, "loop_reindexing_after_fusion")


def cuda_code(
    function: Callable[..., Any],
    *cpu_args: Any,
    dynamic: bool | None = False,
    backward: bool = False,
    options: dict[str, Any] | None = None,
    load: Callable[[str], Callable[[list[Any]], Any]] | None = None,
    **cpu_kwargs: Any,
) -> tuple[Any, list[str]]:
    """Runs `torch.compile(function, fullgraph=True)` once on CPU tensors.

    Returns:
        The result, and the Python source that Inductor generates for a CUDA device, one per graph
        (with `backward`, the backward graph of `result.sum()` too). The result is computed by the
        CPU graph, or by what `load` makes of the source (see `tests.support.generated`).
    """
    import torch._inductor.config as inductor_config
    from functorch.compile import make_boxed_func
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def keep_source(self: Any) -> Any:
        wrapper, _ = self.codegen_with_cpp_wrapper() if self.cpp_wrapper else self.codegen()
        sources.append(wrapper.value)

        def never(*args: Any) -> None:
            raise AssertionError("code generated for a described device was run")

        return types.SimpleNamespace(__file__="described", call=never)

    def inner_compile(graph_module: Any, inputs: Any, **kwargs: Any) -> Any:
        graph, moved = on_cuda(graph_module, inputs)
        keep = mock.patch.object(GraphLowering, "compile_to_module", keep_source)
        # where PyTorch cannot tell what a kernel writes, it warns and copies all its inputs
        unknown = AssertionError("what a kernel writes is not known")
        strict = mock.patch.object(triton_kernel_wrap.log, "warning", side_effect=unknown)
        with described_device(), keep, strict:
            compile_fx_inner(graph, moved, **kwargs)
        if load is None:
            return make_boxed_func(graph_module.forward)
        call = load(sources[-1])
        return make_boxed_func(lambda *args: call(list(args)))

    def backend(graph_module: Any, inputs: Any) -> Any:
        return compile_fx(graph_module, inputs, inner_compile=inner_compile, config_patches=options)

    torch._dynamo.reset()
    no_caches = inductor_config.patch(force_disable_caches=True, compile_threads=1)
    with no_caches, described_driver():
        compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
        result = compiled(*cpu_args, **cpu_kwargs)
        if backward:
            result.sum().backward()
    return result, sources


@contextlib.contextmanager
def captured() -> Iterator[list[Any]]:
    """Has `cuda_code` compile for CUDA graphs.

    Yields the `CompiledFxGraph` of each graph that would be captured whole; one that would be
    skipped, or cut into parts, is not in the list.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor import cudagraph_utils, output_code

    found: list[Any] = []

    def keep(inputs: Any, graph: Any, *args: Any) -> None:
        if not graph.cudagraph_info.cudagraph_fail_reasons and len(graph.partition_maps or []) < 2:
            graph.example_inputs = inputs
            found.append(graph)

    with contextlib.ExitStack() as stack:
        stack.enter_context(inductor_config.patch({"triton.cudagraphs": True}))
        for name in ("cudagraph_post_compile", "cudagraph_partition_post_compile"):
            stack.enter_context(mock.patch.object(output_code, name, keep))
        if hasattr(cudagraph_utils, "check_caching_allocator_for_cudagraphs"):
            name = "check_caching_allocator_for_cudagraphs"
            stack.enter_context(mock.patch.object(cudagraph_utils, name, return_value=None))
        yield found

"""A CUDA device that is described instead of present, for code that is generated and not run.

Dynamo and AOTAutograd see CPU tensors as usual. Where Inductor receives the ATen graph, `on_cuda`
copies it with every tensor's metadata moved to `cuda`, and within `described_device()` the few
queries that code generation makes of a device are answered for an H200. Needs the `triton` package
of the installed torch, which imports without a GPU.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map

from kda_ops import tuning
from kda_ops.lowering.explain.unguarded import unguarded

H200 = types.SimpleNamespace(
    name="NVIDIA H200 (described, not present)",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="",
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    uuid="described",
)
CAPABILITY = (H200.major, H200.minor)


class DescribedDriver:
    """Triton's active driver, whose target the analysis of a hand-written kernel asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", H200.major * 10 + H200.minor, H200.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return CAPABILITY


@contextlib.contextmanager
def described_driver() -> Iterator[None]:
    """Triton has an active driver, also on a machine without a GPU, and rewrites are those for
    one.
    """
    from triton.runtime.driver import driver

    from kda_ops.lowering.rewrites.framework import for_virtual_gpu

    previous = driver.__dict__.get("_active")
    driver.set_active(DescribedDriver())
    try:
        with for_virtual_gpu():
            yield
    finally:
        driver._active = previous


@contextlib.contextmanager
def described_device() -> Iterator[None]:
    """Inductor's code generation believes in one CUDA device. Nothing may run on it."""
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import hints
    from torch._subclasses.fake_tensor import FakeTensorMode

    def forget_answers() -> None:
        for module in (triton_utils, inductor_utils):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        tuning.clear_cache()
        hints.DeviceProperties.create.cache_clear()
        device_interface.caching_worker_device_properties.pop("cuda", None)
        device_interface.caching_worker_current_devices.pop("cuda", None)

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": CAPABILITY,
        "get_device_name": H200.name,
        "is_bf16_supported": True,
        "synchronize": None,
        "_lazy_init": None,
        "init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "exchange_device": 0,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    lazy_init = joint_graph.lazy_init
    with contextlib.ExitStack() as stack:

        def answer(target: Any, wrap: Callable[[Any], Any]) -> None:
            for name, value in answers.items():
                if hasattr(target, name):
                    stack.enter_context(
                        mock.patch.object(target, name, wrap(lambda *a, _v=value, **k: _v))
                    )

        answer(torch.cuda, lambda function: function)
        answer(device_interface.CudaInterface, staticmethod)
        # constructors of fake tensors keep running on `meta` although a device is now "available"
        stack.enter_context(
            mock.patch.object(FakeTensorMode, "avoid_device_init", True, create=True)
        )
        # the joint-graph patterns make example tensors on the input's device; any device will do
        on_cpu = lambda *a, **k: lazy_init(torch.device("cpu"))  # noqa: E731
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init", on_cpu))
        # a warning about a setting for a device that is not there
        stack.enter_context(mock.patch.object(compile_fx, "_warn_tf32_disabled"))
        forget_answers()
        stack.enter_context(described_driver())
        if not torch.backends.cuda.is_built():
            stack.enter_context(unguarded())
        try:
            yield
        finally:
            forget_answers()


def on_cuda(graph_module: Any, inputs: Any) -> tuple[Any, list[Any]]:
    """A copy of an ATen graph, and its inputs, with the device of every CPU tensor changed to
    cuda.
    """
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor

    values = [node.meta.get("val") for node in graph_module.graph.nodes]
    mode = detect_fake_mode(inputs) or detect_fake_mode(values)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    moved: dict[int, tuple[Any, Any]] = {}

    def move(x: Any) -> Any:
        if isinstance(x, FakeTensor) and x.device == cpu:
            if id(x) not in moved:
                with mode:
                    twin = torch.empty_strided(
                        x.shape,
                        x.stride(),
                        dtype=x.dtype,
                        device=cuda,
                        requires_grad=x.requires_grad,
                    )
                moved[id(x)] = (twin, x)  # the original is kept alive: its id is the key
            return moved[id(x)][0]
        return cuda if isinstance(x, torch.device) and x == cpu else x

    graph = torch.fx.Graph()
    copies: dict[Any, Any] = {}
    for node in graph_module.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.meta = {
            key: tree_map(move, value) if key in ("val", "eager_input_vals") else value
            for key, value in node.meta.items()
        }
        if node.op == "call_function":
            copy.args = tree_map(move, copy.args)
            copy.kwargs = tree_map(move, dict(copy.kwargs))
        copies[node] = copy
    result = torch.fx.GraphModule(graph_module, graph)
    result.meta = dict(graph_module.meta)
    return result, [move(x) for x in inputs]

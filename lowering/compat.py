"""Every difference between the torch versions that this package supports (2.11 and newer), and
nothing else.
"""

import ctypes
import functools
import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.dependencies import StarDep, WeakDep
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_leaves

from kda_ops._tracing import hint
from kda_ops.lowering.graph.matching import same_shape, value, values
from kda_ops.lowering.graph.provenance import inherit

CPP_ERRORS = (InvalidCxxCompiler, CppCompileError)  # what `load_cpp` raises without a compiler


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


def load_cpp(source: str) -> ctypes.CDLL:
    """Compiles a C++ library for this machine, as Inductor compiles its kernels, and loads it."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def cache_folders() -> dict[str, str]:
    """Where Inductor and Triton keep what they compile."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    return {"Inductor": cache_dir(), "Triton": triton_cache_dir(0)}


def size_hint(expression: Any) -> int:
    """The number that a symbolic size of the graph being lowered had when it was traced."""
    sizes = V.graph.sizevars
    hint = sizes.optimization_hint if hasattr(sizes, "optimization_hint") else sizes.size_hint
    return int(hint(expression, fallback=0))


def weigh_hinted_sizes() -> None:
    """Lets fusions in the graph being lowered count what has an unknown size with a hint.

    Torch 2.11 fuses nothing of an unknown size, newer versions go by its hint.
    """
    graph = V.graph
    if hasattr(graph.sizevars, "all_unbacked_explicitly_hinted") or "get_dep_size_hint" in vars(
        graph
    ):
        return
    weigh = graph.get_dep_size_hint

    def weigh_hinted(dependency: Any, count_bytes: bool = True) -> int:
        try:
            symbols = free_unbacked_symbols(dependency.get_numel())
            if symbols and symbols <= graph.sizevars.var_to_hint_override.keys():
                return dependency.numbytes_hint() if count_bytes else dependency.numel_hint()
        except KeyError:  # of a buffer that is not in the graph, as Inductor expects there
            pass
        return weigh(dependency, count_bytes)

    graph.get_dep_size_hint = weigh_hinted


def refresh_users(node: fx.Node) -> None:
    """Brings the fake values of what reads a new node up to date, and of what reads that.

    Inductor does so itself, after all passes. In torch 2.11 it knows a changed node by the address
    of its arguments, and a node that is changed twice may get back the address of the first ones.
    Then a view keeps the strides and the storage of a tensor that is gone, and what is lowered for
    those strides gets a copy.
    """
    pending = [node]
    while pending:
        for user in pending.pop().users:
            is_item = user.target is operator.getitem
            if not is_item and not isinstance(user.target, torch._ops.OpOverload):
                continue
            if not all("val" in known.meta for known in (user, *user.all_input_nodes)):
                continue
            args, kwargs = values(user.args), values(user.kwargs)
            symbols = V.fake_mode.shape_env
            no_new = symbols.ignore_fresh_unbacked_symbols() if symbols else nullcontext()
            with V.fake_mode, enable_python_dispatcher(), no_new:
                new = user.target(*args, **kwargs)
            if is_item or differs(new, value(user), (args, kwargs)):
                user.meta["val"] = new
                pending.append(user)


def differs(new: Any, old: Any, inputs: Any) -> bool:
    """Whether a fake value has other strides than before, or is a view of what it is made of."""

    def tensors(x: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]

    read = {x.untyped_storage()._cdata for x in tensors(inputs)}
    return any(
        x.untyped_storage()._cdata in read or not same_shape(x.stride(), y.stride())
        for x, y in zip(tensors(new), tensors(old), strict=True)
    )


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


def keep_order_when_recomputed() -> None:
    """Lets a node whose loops are computed anew keep the order of its writes behind others.

    On a CPU torch 2.11 then forgets all that a node waits for but what it reads, and a state is put
    back before the step that it is to undo.
    """
    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_size_and_body(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        order = OrderedSet(x for x in self.read_writes.reads if isinstance(x, (StarDep, WeakDep)))
        recompute(self, *args, **kwargs)
        if order - self.read_writes.reads:
            self.set_read_writes(self.read_writes.with_read(order))

    SchedulerNode.recompute_size_and_body = recompute_size_and_body


def fold_no_views_of_other_sizes() -> None:
    """Keeps constant folding from viewing one element as one of another size.

    Torch 2.11 raises there, such as at fresh pages of bytes that are viewed as states.
    """
    deduce = UniformValueConstantFolder._deduce_value

    @functools.wraps(deduce)
    def _deduce_value(self: UniformValueConstantFolder, node: fx.Node) -> Any:
        if node.target is torch.ops.aten.view.dtype:
            old, new = value(node.args[0]), value(node)
            if old.element_size() != new.element_size():
                return self.unknown_value
        return deduce(self, node)

    UniformValueConstantFolder._deduce_value = _deduce_value


def tell_overlap_by_hints() -> None:
    """Lets CUDA graphs take inputs of unknown sizes, such as a server's rows.

    Torch 2.11 asks whether an input overlaps itself and cannot tell without sizes; newer versions
    do not ask.
    """
    from torch._inductor import output_code

    if not hasattr(output_code, "complex_memory_overlap"):
        return
    overlaps = output_code.complex_memory_overlap

    @functools.wraps(overlaps)
    def complex_memory_overlap(x: torch.Tensor) -> bool:
        numbers = (*x.shape, *x.stride())
        if free_unbacked_symbols(numbers):
            known = [hint(n) if isinstance(n, torch.SymInt) else n for n in numbers]
            if None in known:
                return False
            size, stride = known[: x.dim()], known[x.dim() :]
            x = torch.empty_strided(size, stride, dtype=x.dtype, device="meta")
        return bool(overlaps(x))

    output_code.complex_memory_overlap = complex_memory_overlap


def analyse_kernels_inlined() -> None:
    """Puts the device functions of this package's kernels in line before PyTorch looks for what a
    kernel writes.

    It takes every argument of a function for part of the result: if a page is looked up by a
    function, then what is stored there seems to be stored to the lookup table too. A table that is
    written is an input that no CUDA graph accepts.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    generate = triton_kernel_wrap.generate_ttir

    @functools.wraps(generate)
    def generate_ttir(kernel: Any, *args: Any) -> Any:
        module, names = generate(kernel, *args)
        while hasattr(kernel, "fn"):
            kernel = kernel.fn
        if kernel.__module__.partition(".")[0] == "kda_ops":
            put_in_line(module)
        return module, names

    triton_kernel_wrap.generate_ttir = generate_ttir


def put_in_line(module: Any) -> None:
    """Replaces the calls in a Triton module by what they call."""
    from triton._C.libtriton import ir, passes

    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    manager.run(module, "inline")

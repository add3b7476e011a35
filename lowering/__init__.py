"""How Inductor sees the operators: lowerings and graph rewrites. `install()` is the only entry.

Importing this package costs nothing; `install()` imports `torch._inductor`. `kda_ops` calls it by
itself on the first trace.
"""

import importlib

OPERATORS = (
    "table",
    "chunk_cumsum",
    "conv_split",
    "gate_cumsum",
    "gradients",
    "short_conv_backward",
)  # files of lowerings
FUSIONS = (  # in the order in which they run
    "fuse_plain_l2norm",
    "fuse_plain_cumsum",
    "fuse_plain_gate",
    "fuse_plain_norm",
    "fuse_repeated_heads",
    "fuse_cumsum_scale",
    "fuse_gate_cumsum",
    "fuse_kda_decode",
    "fuse_training_convs",
    "fuse_separate_convs",
    "fuse_chunk_kda_gated",
    "fuse_chunk_norms",
    "fuse_short_conv_qkv",  # the norms that the recurrence does not take
    "fuse_packed_projection",
    "fuse_chunk_kda_training",  # before all others, where there are gradients
    "save_chunks",
)

_installed = False


def install() -> None:
    """Registers lowerings, rewrites and a cache key of their sources (idempotent).

    Inductor's and AOTAutograd's disk caches do not look at lowerings: without the key, a process
    with a changed lowering is served the code of the old one.
    """
    global _installed
    if _installed:
        return
    _installed = True
    for folder, names in (("operators", OPERATORS), ("rewrites", FUSIONS)):
        for name in names:
            importlib.import_module(f"kda_ops.lowering.{folder}.{name}")
    from kda_ops.lowering.cache_key import install_cache_key
    from kda_ops.lowering.compat import (
        analyse_kernels_inlined,
        fold_no_views_of_other_sizes,
        keep_order_when_recomputed,
        lower_storage_offset,
        tell_overlap_by_hints,
    )
    from kda_ops.lowering.graph.snapshots import keep_copies, keep_reads_apart, order_reads
    from kda_ops.lowering.rewrites.before_autograd import install_before_autograd
    from kda_ops.lowering.rewrites.framework import install_rewrites

    lower_storage_offset()
    tell_overlap_by_hints()
    analyse_kernels_inlined()
    fold_no_views_of_other_sizes()
    keep_order_when_recomputed()
    keep_copies()
    order_reads()
    keep_reads_apart()
    install_before_autograd()
    install_rewrites()
    install_cache_key()

"""How Inductor sees the operators: lowerings and graph rewrites. `install()` is the only entry.

Importing this package costs nothing; `install()` imports `torch._inductor`. `kda_ops` calls it by
itself on the first trace.
"""

import hashlib
import importlib
from pathlib import Path

OPERATORS = (
    "chunk_cumsum",
    "chunk_kda",
    "chunk_kda_gated",
    "conv_split",
    "gate",
    "gate_cumsum",
    "kda_decode",
    "l2norm",
    "recurrent_kda",
    "rms_norm_gated",
    "short_conv",
    "short_conv_qkv",
    "short_conv_update",
    "state_copy",
)
FUSIONS = (  # in the order in which they run
    "fuse_plain_l2norm",
    "fuse_plain_cumsum",
    "fuse_plain_gate",
    "fuse_plain_norm",
    "fuse_repeated_heads",
    "fuse_cumsum_scale",
    "fuse_gate_cumsum",
    "fuse_kda_decode",
    "fuse_separate_convs",
    "fuse_chunk_kda_gated",
    "fuse_chunk_norms",
    "fuse_short_conv_qkv",  # the norms that the recurrence does not take
    "fuse_packed_projection",
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
    for name in (*OPERATORS, *FUSIONS):
        importlib.import_module(f"lowering.{name}")
    from lowering.cache_key import install_cache_key
    from lowering.compat import lower_storage_offset
    from lowering.rewrite import install_rewrites
    from lowering.snapshots import keep_copies, keep_reads_apart, order_reads

    lower_storage_offset()
    keep_copies()
    order_reads()
    keep_reads_apart()
    install_rewrites()
    install_cache_key()


def source_hash() -> str:
    """SHA-256 of all sources: lowerings, rewrites, references and kernels."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for root in (here, here.parent / "kda_ops"):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()

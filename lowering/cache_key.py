"""Puts our sources into Inductor's and AOTAutograd's cache keys, without taking a slot that
belongs to the user.
"""

import hashlib
from pathlib import Path

from torch._inductor.codegen.common import custom_backend_passes
from torch._inductor.custom_graph_pass import CustomGraphModulePass

from kda_ops import config, tuning


def source_hash() -> str:
    """SHA-256 of all sources: lowerings, rewrites, references and kernels."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for root in (here.parent, here):  # in a checkout `here` is a link, which is not followed
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class SourceHash(CustomGraphModulePass):
    """A graph pass that changes nothing and is there for its `uuid`: our sources, and the
    configuration that counts while a graph is lowered. (What counts while it is traced is in the
    graph.)
    """

    def __init__(self) -> None:
        self._hash = source_hash()

    def __call__(self, gm: object) -> None:
        pass

    def uuid(self) -> str:
        return f"kda_ops-{self._hash}-{tuning.cache_key()}-{config.saved_bytes}"


def install_cache_key() -> None:
    custom_backend_passes["kda_ops"] = SourceHash()

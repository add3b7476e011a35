"""Puts our sources into Inductor's and AOTAutograd's cache keys, without taking a slot that
belongs to the user.
"""

from torch._inductor.codegen.common import custom_backend_passes
from torch._inductor.custom_graph_pass import CustomGraphModulePass

from kda_ops import lowering, tuning


class SourceHash(CustomGraphModulePass):
    """A graph pass that changes nothing and is there for its `uuid`: our sources, and the
    configuration that counts while a graph is lowered. (What counts while it is traced is in the
    graph.)
    """

    def __init__(self) -> None:
        self._hash = lowering.source_hash()

    def __call__(self, gm: object) -> None:
        pass

    def uuid(self) -> str:
        return f"kda_ops-{self._hash}-{tuning.cache_key()}"


def install_cache_key() -> None:
    custom_backend_passes["kda_ops"] = SourceHash()

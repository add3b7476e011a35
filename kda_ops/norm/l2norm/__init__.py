"""L2 norm over the last axis."""

from kda_ops.norm.l2norm.op import l2norm

__all__ = ["l2norm"]

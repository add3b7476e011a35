"""Prefix sums that restart with every chunk."""

from kda_ops.gating.chunk_cumsum.op import chunk_cumsum

__all__ = ["chunk_cumsum"]

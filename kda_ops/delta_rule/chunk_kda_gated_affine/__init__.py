"""Chunked Kimi Delta Attention as an affine function of the state before it."""

from kda_ops.delta_rule.chunk_kda_gated_affine.op import chunk_kda_gated_affine

__all__ = ["chunk_kda_gated_affine"]

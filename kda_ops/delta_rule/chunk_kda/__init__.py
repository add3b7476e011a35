"""Chunked Kimi Delta Attention: prefill."""

from kda_ops.delta_rule.chunk_kda.op import chunk_kda

__all__ = ["chunk_kda"]

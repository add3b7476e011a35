"""Chunked Kimi Delta Attention from the raw gate and the raw beta: prefill."""

from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated

__all__ = ["chunk_kda_gated"]

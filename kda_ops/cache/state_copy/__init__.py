"""Copies conv and recurrent states between slots: every request and layer in one launch."""

from kda_ops.cache.state_copy.op import state_copy

__all__ = ["state_copy"]

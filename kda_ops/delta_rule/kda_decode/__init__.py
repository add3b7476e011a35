"""A whole decode step between the projections: convolution, recurrence and norm in one."""

from kda_ops.delta_rule.kda_decode.op import kda_decode

__all__ = ["kda_decode"]

"""One or a few tokens of the KDA recurrence per sequence, on paged states."""

from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda

__all__ = ["recurrent_kda"]

"""The KDA recurrence token by token, in eager PyTorch: definition, CPU implementation, oracle."""

from kda_ops.delta_rule.formulas import recurrence as recurrent_kda_reference

__all__ = ["recurrent_kda_reference"]

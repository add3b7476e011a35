"""The cumulative KDA gate in log2."""

from kda_ops.gating.gate_cumsum.op import gate_cumsum

__all__ = ["gate_cumsum"]

"""The KDA gate in nats."""

from kda_ops.gating.gate.op import gate

__all__ = ["gate"]

"""The KDA gate in nats."""

from kda_ops.gate.op import gate

__all__ = ["gate"]

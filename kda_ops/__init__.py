"""Kimi Delta Attention as operators that torch.compile understands.

Importing this package loads neither Triton nor Inductor.
"""

from kda_ops.gate import gate

__all__ = ["gate"]

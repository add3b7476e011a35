"""The gradients of q and k: sums over value heads, and the derivative of the norm."""

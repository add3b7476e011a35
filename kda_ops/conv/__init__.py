"""The short convolution of q, k and v, and its state."""

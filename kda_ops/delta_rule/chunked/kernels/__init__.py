"""Triton kernels of chunked KDA."""

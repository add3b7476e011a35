"""Shared by both chunked operators: formulas, workspace, kernels."""

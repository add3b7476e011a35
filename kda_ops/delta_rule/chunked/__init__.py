"""What both chunked operators share: formulas, workspace, kernels."""

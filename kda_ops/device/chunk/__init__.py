"""What the Triton kernels of chunked KDA share."""

"""What the gradient of chunked KDA recomputes of the forward pass, chunk by chunk."""

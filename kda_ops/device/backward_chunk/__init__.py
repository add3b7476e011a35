"""The gradient of chunked KDA within a chunk."""

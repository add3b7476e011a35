"""The first kernel of chunked KDA, for any size and dtype."""

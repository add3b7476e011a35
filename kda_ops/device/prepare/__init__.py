"""The first kernel of chunked KDA, for chunks that one program holds."""

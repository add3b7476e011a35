"""The gradient of chunked KDA: its launches, one after the other."""

"""The gradient of chunked KDA for any sizes and dtypes."""

"""The demos of `python -m kda_ops`."""

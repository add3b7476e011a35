"""What `python -m kda_ops` runs."""

"""The layer module and its checkpoints."""

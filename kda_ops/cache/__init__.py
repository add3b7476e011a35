"""For servers: states, batches, checkpoints at block boundaries."""

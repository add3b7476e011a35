"""What a server owns: states, batches, checkpoints at block boundaries."""

"""Modules: the layer, and the checkpoints it loads."""

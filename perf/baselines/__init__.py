"""Baselines: what users would use instead."""

"""Triton device functions that more than one kernel uses (in `kernel.py`, which alone imports Triton)."""

"""Triton device functions that more than one kernel uses; `kernel.py` alone imports Triton."""

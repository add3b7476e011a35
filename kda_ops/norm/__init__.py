"""Norms: L2 of queries and keys, gated RMS of outputs."""

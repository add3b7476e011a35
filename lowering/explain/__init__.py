"""Compiles for a GPU that need not be there, and reads what came out."""

"""Patterns that several rewrites match."""

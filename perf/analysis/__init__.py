"""Analysis of runs."""

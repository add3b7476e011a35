"""Graph rewrites, one file each, and the framework they share."""

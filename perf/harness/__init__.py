"""How rows are measured."""

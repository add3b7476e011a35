"""This package under the names of other projects, none of which is needed to import it."""

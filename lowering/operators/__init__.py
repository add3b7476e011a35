"""How Inductor lowers each operator."""

"""Reading FX graphs and making nodes."""

"""The recurrences of the gradient of chunked KDA: states forward, their gradients backward."""

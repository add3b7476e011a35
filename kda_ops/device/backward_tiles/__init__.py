"""What pairs of rows of a chunk give each other in the gradient of chunked KDA."""

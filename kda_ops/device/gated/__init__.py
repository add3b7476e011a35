"""The raw gate, the raw beta and the norms, as kernels compute them."""

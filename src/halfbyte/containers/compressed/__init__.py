"""compressed-tensors: a layout for each of its formats, and the container that chooses among them."""

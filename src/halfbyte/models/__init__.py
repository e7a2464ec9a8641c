"""From a folder of tensors to a model that runs block by block."""

"""How bits lie in a folder of safetensors. To add a container: one file, and one line in `halfbyte.registry`."""

"""GGUF: all that is known of llama.cpp's files, its types of blocks, its names of tensors and its presets."""

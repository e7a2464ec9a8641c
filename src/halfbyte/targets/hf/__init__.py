"""A folder of safetensors as on the Hugging Face hub."""

"""What a quantized model is written as: one folder for each form of output, and one line in `halfbyte.registry`."""

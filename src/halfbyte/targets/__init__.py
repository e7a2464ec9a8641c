"""What a quantized model is written as: one room for each form of output."""

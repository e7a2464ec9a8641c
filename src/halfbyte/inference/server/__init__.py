"""A checkpoint that answers over HTTP, by OpenAI's protocol."""

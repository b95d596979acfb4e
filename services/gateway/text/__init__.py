"""Text and tokens: what turns a client's words into a model's numbers and back. Pure."""

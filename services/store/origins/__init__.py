"""Where checkpoints come from when they are not on this host: object stores, HTTP, the Hugging Face hub."""

"""Sessions: from tokens to text, and on elsewhere when a replica ends."""

"""The inference worker: one model on its devices, the batch, the KV cache."""

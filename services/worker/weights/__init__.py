"""Weights: from the store's pool to where the model computes, and what waits for them."""

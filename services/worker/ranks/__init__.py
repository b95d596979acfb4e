"""Tensor-parallel ranks: several workers, each with a piece of every layer, compute as one replica."""

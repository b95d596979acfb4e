"""The control plane: registry, placement, scaling."""

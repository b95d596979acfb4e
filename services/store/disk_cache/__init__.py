"""The store's own copies of remote checkpoints on this host's disk."""

"""Sessions on this node: relayed, kept, fenced, moved."""

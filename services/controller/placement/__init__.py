"""Where a model should start: options, bounds, the search over nodes, the choice. Pure."""

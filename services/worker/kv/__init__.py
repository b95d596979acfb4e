"""Keys and values: kept per session, shipped out of an engine and into another."""

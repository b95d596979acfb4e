"""The cluster as it is known: immutable values, events folded into them, summaries, what was learnt. Pure."""

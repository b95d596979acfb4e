"""Reading: which bytes come next, from which source, in which threads, and how fast."""

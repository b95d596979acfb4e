"""One per host: the checkpoint store daemon: pool, tiers, transfers."""

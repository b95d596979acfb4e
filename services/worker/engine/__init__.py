"""The engine: sessions, forward passes, attention, sampling; one step at a time."""

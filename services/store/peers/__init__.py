"""Stores that load the same checkpoint read its origin once and feed each other over plain TCP."""

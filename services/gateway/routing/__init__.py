"""Routing: which replica takes a session, and how one is found or started."""

"""Clients for applications and for Stoker's own services."""

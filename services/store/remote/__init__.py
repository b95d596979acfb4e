"""Checkpoints that are elsewhere: opened through their headers, brought here while they are used."""

"""Integrity: what disks give, checked against what was written."""

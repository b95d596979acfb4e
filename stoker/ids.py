"""Identifiers: one NewType per thing, so that a replica id never lands where a node id belongs."""

from __future__ import annotations

import secrets
from typing import NewType

ModelName = NewType("ModelName", str)
"""The name a client asks for, e.g. `smollm2`; chosen by whoever deploys."""

Revision = NewType("Revision", str)
"""What exactly a checkpoint's bytes are; changes when they do."""

CheckpointUri = NewType("CheckpointUri", str)
"""Where a checkpoint comes from: an absolute path or `file://`, later `hf://`, `s3://`, …"""

NodeId = NewType("NodeId", str)
ReplicaId = NewType("ReplicaId", str)
WorkerId = NewType("WorkerId", str)
SessionId = NewType("SessionId", str)
"""One choice of one request: a request with n = 3 has three sessions."""

RequestId = NewType("RequestId", str)


def new_id(prefix: str) -> str:
    """Return a fresh id such as `rep-9f86d081884c7d65`: a readable prefix and 64 random bits."""
    return f"{prefix}-{secrets.token_hex(8)}"

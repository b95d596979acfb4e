"""API keys: who may ask. The same for REST and gRPC."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from stoker.errors import Unauthenticated


class ApiKeys:
    """The keys accepted.

    Args:
        keys: Empty = no key is needed.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def check(self, authorization: str) -> None:
        """Let a caller in by its `Authorization` header or metadata; empty = it sent none.

        Raises:
            Unauthenticated: A key is needed, and this is none.
        """
        if not self._keys:
            return
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        matches = [secrets.compare_digest(given, known) for known in self._keys]  # all, in constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthenticated("no valid API key: send one as `Authorization: Bearer <key>`")

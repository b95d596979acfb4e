"""What callers of the state catch: the state is not there, or a lease is over."""

from __future__ import annotations

from stoker.errors import PeerError


class StateUnavailable(PeerError):
    """The state did not answer (in time), or the store is closed.

    A `transact` that ends so may have been committed or not: read again before deciding.
    """


class LeaseLost(PeerError):
    """The lease has expired or was revoked; keys attached to it are gone, or will be in a moment."""

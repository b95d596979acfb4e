"""Clients for applications: `Client` (blocking) and `AsyncClient` (asyncio), over gRPC.

Any OpenAI client works against the gateway's REST face; these speak gRPC and can administer too.
"""

from __future__ import annotations

from stoker.client.asynchronous import AsyncClient
from stoker.client.synchronous import Client

__all__ = ["AsyncClient", "Client"]

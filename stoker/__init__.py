"""Stoker: serves many large language models from few GPUs, serverless."""

from __future__ import annotations

import os

# grpc's core writes connection chatter to stderr; it reads this when it is first imported
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def __getattr__(name: str) -> str:
    """Look `__version__` up when it is asked for: it takes longer than everything else here."""
    if name == "__version__":
        from importlib import metadata  # noqa: PLC0415 - see above

        try:
            return metadata.version("stoker")
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

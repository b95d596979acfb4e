"""Stoker: serves many large language models from few GPUs, serverless."""

from __future__ import annotations

import os
from importlib import metadata

# grpc's core writes connection chatter to stderr; it reads this when it is first imported
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

try:
    __version__ = metadata.version("stoker")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]

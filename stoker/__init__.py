"""Stoker: serves many large language models from few GPUs, serverless."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("stoker")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]

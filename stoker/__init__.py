"""Stoker: serves many large language models from few GPUs, serverless.

The loader needs no cluster: `save_model`, `load_model`, `load_tensors`, `open`, `load_adapter`, see
docs/library.md. Each is imported when it is asked for: `import stoker` takes neither torch nor anything else
that is slow.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.loader.adapters import load_adapter as load_adapter
    from stoker.loader.load import load_model as load_model
    from stoker.loader.load import load_tensors as load_tensors
    from stoker.loader.open_file import open_lazily as open  # noqa: A004, F401 - `stoker.open`, as `gzip.open`
    from stoker.loader.save import save_model as save_model

# grpc's core writes connection chatter to stderr; it reads this when it is first imported
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

_LAZY = {
    "load_adapter": ("stoker.loader.adapters", "load_adapter"),
    "load_model": ("stoker.loader.load", "load_model"),
    "load_tensors": ("stoker.loader.load", "load_tensors"),
    "open": ("stoker.loader.open_file", "open_lazily"),
    "save_model": ("stoker.loader.save", "save_model"),
}


def __getattr__(name: str) -> Any:
    """Look up what takes long to import, or to find, when it is asked for."""
    if name in _LAZY:
        from importlib import import_module  # noqa: PLC0415 - see above

        module, attribute = _LAZY[name]
        found = getattr(import_module(module), attribute)
        globals()[name] = found
        return found
    if name == "__version__":
        from importlib import metadata  # noqa: PLC0415 - see above

        try:
            return metadata.version("stoker")
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})

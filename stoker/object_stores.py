"""obstore, an optional dependency: loaded when it is needed, and what it says made fit for people."""

from __future__ import annotations

import re
from typing import Any

from stoker.errors import ConfigError

MAX_REASON_CHARACTERS = 300


def import_obstore() -> Any:
    """Return the obstore package, with its exceptions and stores loaded.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import obstore  # noqa: PLC0415 - an optional dependency
        import obstore.exceptions  # noqa: PLC0415 - as above
        import obstore.store  # noqa: PLC0415 - as above
    except ImportError as error:
        raise ConfigError("object stores need obstore: pip install 'stoker[remote]' here") from error
    return obstore


def reason_of(error: Exception) -> str:
    """Return an error's first words: nothing for debugging, no queries, since signatures travel there."""
    said = str(error).partition("Debug source")[0]
    text = re.sub(r"\?[^\s\"')]+", "?…", " ".join(said.split()))
    return text[:MAX_REASON_CHARACTERS]

"""Drop-in for transformers: change one import line, and `from_pretrained` loads through Stoker.

    from stoker.transformers import AutoModelForCausalLM, AutoTokenizer

Every `AutoModel…` class here loads local folders and hub ids through Stoker and returns the same model that
transformers' own class would have returned. Every other name is transformers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from transformers import *  # noqa: F403 - names that __getattr__ finds

_made: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """Return transformers' attribute; an auto class of models with another `from_pretrained`."""
    found = getattr(transformers, name)
    if not name.startswith("AutoModel") or getattr(found, "_model_mapping", None) is None:
        return found
    if name not in _made:
        from stoker.loader.drop_in import through_stoker  # noqa: PLC0415 - needs torch

        _made[name] = through_stoker(found)
    return _made[name]


def __dir__() -> list[str]:
    return dir(transformers)

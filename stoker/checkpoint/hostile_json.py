"""Read JSON that someone else wrote: bounded, strict, without surprises.

Python's parser accepts duplicate keys, NaN and any depth, and a small text can become a large object.
Everything here refuses with `CheckpointInvalid`, naming the file.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn, cast

from stoker.errors import CheckpointInvalid

MAX_JSON_VALUES = 4_000_000
"""Objects, arrays and elements in one document: bounds memory at a few hundred MB before parsing.

The largest public checkpoints have about 200,000 tensors, each with 8 values in a header.
"""


def parse_object(text: bytes, *, where: str) -> dict[str, Any]:
    """Parse `text` as one JSON object.

    Args:
        text: UTF-8; the caller has bounded its length.
        where: Which file it comes from, for messages.

    Raises:
        CheckpointInvalid: Not UTF-8, not JSON, not an object, too deep, too many values, or a key twice.
    """
    if text.count(b"[") + text.count(b"{") + text.count(b",") > MAX_JSON_VALUES:
        raise CheckpointInvalid(
            f"{where}: more than {MAX_JSON_VALUES:,} JSON values; this is not a checkpoint's file."
        )
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_integer if b"-0" in text else int,  # the scanner's own way is several times faster
        )
    except UnicodeDecodeError as error:
        raise CheckpointInvalid(
            f"{where}: not UTF-8 (byte {error.start}); the file is damaged, fetch it again."
        ) from error
    except RecursionError as error:
        raise CheckpointInvalid(
            f"{where}: JSON nested too deeply; this is not a checkpoint's file."
        ) from error
    except ValueError as error:
        raise CheckpointInvalid(
            f"{where}: not valid JSON ({error}); the file is damaged, fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{where}: a JSON object is needed, this is {type(value).__name__}.")
    return cast("dict[str, Any]", value)


def require_str(value: object, *, where: str, field: str) -> str:
    """Return `value` if it is a string that UTF-8 can carry."""
    if not isinstance(value, str) or not _encodes(value):
        _refuse(where, field, "a string", value)
    return value


def require_int(value: object, *, where: str, field: str, low: int = 0, high: int = 2**63 - 1) -> int:
    """Return `value` if it is an integer (not a bool, not 1.0) in `low` … `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(where, field, f"an integer in {low} … {high}", value)
    return value


def require_list(value: object, *, where: str, field: str) -> list[Any]:
    """Return `value` if it is an array."""
    if not isinstance(value, list):
        _refuse(where, field, "an array", value)
    return value


def require_fields(value: object, fields: frozenset[str], *, where: str, field: str) -> dict[str, Any]:
    """Return `value` if it is an object with exactly `fields`."""
    if not isinstance(value, dict) or value.keys() != fields:
        _refuse(where, field, f"an object with exactly {', '.join(sorted(fields))}", value)
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:100]!r} stands twice in one object")
            seen.add(key)
    return result


def _integer(text: str) -> int | float:
    """Return what other parsers make of `-0`: a float; safetensors' own refuses it as an offset."""
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse(where: str, field: str, wanted: str, value: object) -> NoReturn:
    shown = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    raise CheckpointInvalid(f"{where}: `{field}` must be {wanted}, not {shown[:120]}.")

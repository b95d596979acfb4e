"""Token bytes: what one token of a vocabulary adds to the text, exactly.

Byte-level vocabularies (GPT-2 and its heirs) write each byte as one printable character; sentencepiece
vocabularies write a space as U+2581 and bytes without a character as `<0xNN>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def _printable_bytes() -> dict[str, int]:
    """Return GPT-2's table character → byte: printable ones are themselves, the rest follow U+0100."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; a token with foreign characters stands for its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """Return the bytes of a sentencepiece token: `<0xNN>` is a byte, U+2581 a space."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE_MARK, " ").encode()


class TokenBytes:
    """Bytes of tokens by id, worked out on first use; unknown ids stand for nothing.

    Args:
        token_of: The vocabulary: id → token, None for ids it does not have.
        decode_token: `byte_level_bytes` or `sentencepiece_bytes`.
    """

    def __init__(self, token_of: Callable[[int], str | None], decode_token: Callable[[str], bytes]) -> None:
        self._token_of = token_of
        self._decode_token = decode_token
        self._known: dict[int, bytes] = {}  # bounded by the vocabulary: other ids are not kept

    def __getitem__(self, token_id: int) -> bytes:
        """Return the token's bytes."""
        found = self._known.get(token_id)
        if found is None:
            token = self._token_of(token_id)
            if token is None:
                return b""
            found = self._known[token_id] = self._decode_token(token)
        return found

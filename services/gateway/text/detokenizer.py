"""Detokenizers: tokens in, one at a time; text out as soon as it can no longer change.

For every sequence of tokens the pieces that `push` and `flush` return, joined, are what decoding the whole
sequence at once gives. A character is held until its last byte is there.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from services.gateway.text.token_bytes import TokenBytes

REPLACEMENT = "\ufffd"

MAX_HELD_TOKENS = 64
"""Tokens a `WindowDetokenizer` holds back at most; a UTF-8 character has 4 bytes, so more is garbage."""


class Detokenizer(Protocol):
    """Turns one session's tokens into text."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became certain, maybe none."""
        ...

    def flush(self) -> str:
        """Return what was held back, an incomplete character as U+FFFD. No token follows."""
        ...


class ByteLevelDetokenizer:
    """For byte-level vocabularies: tokens are bytes, and only UTF-8 needs patience. O(1) per token.

    Args:
        token_bytes: Bytes of each token.
        skipped: Special tokens, which are no text.
    """

    def __init__(self, token_bytes: TokenBytes, skipped: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a short window again with each token and returns what it adds.

    The window starts with the tokens of the piece returned last, because what a token adds depends on the
    one before it (sentencepiece strips the space of a text's first word). Joined pieces equal the whole
    decoded at once, except where a model breaks off one byte-coded character to start another: the whole then
    shows more U+FFFD. O(1) per token: a window holds two pieces.

    Args:
        decode: Decodes a few tokens at once, special ones not among them.
        skipped: Special tokens, which are no text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: Collection[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._shown: list[int] = []
        self._shown_characters = 0
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        text = self._decode([*self._shown, *self._held])
        if text.endswith(REPLACEMENT) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._show(self._decode([*self._shown, *self._held])) if self._held else ""

    def _show(self, text: str) -> str:
        piece = text[self._shown_characters :]
        if piece or len(self._held) >= MAX_HELD_TOKENS:
            self._shown, self._held = self._held, []
            self._shown_characters = len(self._decode(self._shown))
        return piece

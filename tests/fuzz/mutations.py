"""Inputs that are nearly right: seeded mutations of bytes, of JSON text and of the numbers in both."""

from __future__ import annotations

import json
import random
import re
import struct

MAX_INPUT_BYTES = 64 * 1024
_NUMBERS = (
    b"-1", b"0", b"1", b"1.0", b"1e400", b"-0", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""',
    b"4294967295", b"4294967296", b"9223372036854775807", b"9223372036854775808", b"18446744073709551615",
    b"18446744073709551616", b"9" * 400, b"9" * 5000, b"0x10", b"1_000",
)  # fmt: skip
_TEXTS = (
    b"\x00", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"../../etc/passwd", b"/", b"..",
    b"__metadata__", b"__stoker_pad__.0", b"model.safetensors", b"F4", b"BF16", b"xxh3-128:", b"\xe2\x80\xae",
)  # fmt: skip


def mutated(seed: bytes, random_: random.Random) -> bytes:
    """Return `seed` after one to six mutations."""
    content = bytearray(seed)
    kinds = random_.choice((_MUTATIONS, (_edit_json,)))  # half of the inputs stay JSON
    for _ in range(random_.choice((1, 1, 2, 3, 6))):
        random_.choice(kinds)(content, random_)
    return bytes(content[:MAX_INPUT_BYTES])


def repaired_length(content: bytes) -> bytes:
    """Return a safetensors file whose length prefix is that of the JSON behind it, where there is one."""
    try:
        _, end = json.JSONDecoder().raw_decode(content[8:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return content
    text = content[8:]
    end += len(text[end:]) - len(text[end:].lstrip(b" "))
    return struct.pack("<Q", end) + text


def _flip_bit(content: bytearray, random_: random.Random) -> None:
    if content:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)


def _set_byte(content: bytearray, random_: random.Random) -> None:
    if content:
        content[random_.randrange(len(content))] = random_.choice(b'\x00\xff"{}[],:\\ 0-9ez')


def _cut(content: bytearray, random_: random.Random) -> None:
    del content[random_.randint(0, len(content)) :]


def _remove(content: bytearray, random_: random.Random) -> None:
    begin = random_.randint(0, len(content))
    del content[begin : begin + random_.randint(1, 32)]


def _repeat(content: bytearray, random_: random.Random) -> None:
    begin = random_.randint(0, len(content))
    piece = content[begin : begin + random_.randint(1, 200)]
    content[begin:begin] = piece * random_.choice((1, 1, 2, 50))


def _insert_text(content: bytearray, random_: random.Random) -> None:
    at = random_.randint(0, len(content))
    content[at:at] = random_.choice(_TEXTS + _NUMBERS)


def _replace_number(content: bytearray, random_: random.Random) -> None:
    found = list(re.finditer(rb"[0-9]+", content))
    if found:
        place = random_.choice(found)
        content[place.start() : place.end()] = random_.choice(_NUMBERS)


def _nest(content: bytearray, random_: random.Random) -> None:
    at = random_.randint(0, len(content))
    content[at:at] = random_.choice((b"[", b'{"a":', b"[[")) * random_.choice((1, 20, 2000, 20_000))


def _set_length(content: bytearray, random_: random.Random) -> None:
    claimed = random_.choice((0, 1, 7, len(content), len(content) - 8, 10**8, 2**31, 2**63, 2**64 - 1))
    content[:8] = struct.pack("<Q", claimed % 2**64)


def _edit_json(content: bytearray, random_: random.Random) -> None:
    """Change a value of the document, so that it stays one."""
    prefix = 8 if content[8:9] == b"{" else 0
    try:
        document, end = json.JSONDecoder().raw_decode(content[prefix:].decode())
    except (ValueError, RecursionError):
        return
    _edit(document, random_)
    content[prefix : prefix + end] = json.dumps(document).encode()


def _edit(node: object, random_: random.Random) -> None:
    while True:
        if not isinstance(node, (dict, list)) or not node:
            return
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random_.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and random_.random() < 0.8:
            node = node[key]
            continue
        match random_.randrange(4):
            case 0:
                node[key] = random_.choice(
                    (None, True, -1, 0, 2**63, 2**64, 1.5, "", "..", [], {}, [0] * 40, 10**300)
                )
            case 1:
                del node[key]
            case 2 if isinstance(node[key], int):
                node[key] += random_.choice((-1, 1, 4096, 2**40))
            case _:
                node[key] = node[random_.choice(keys)] if key in keys else None
        return


_MUTATIONS = (
    _flip_bit,
    _set_byte,
    _cut,
    _remove,
    _repeat,
    _insert_text,
    _replace_number,
    _replace_number,
    _nest,
    _set_length,
    _edit_json,
    _edit_json,
    _edit_json,
)

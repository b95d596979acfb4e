"""What the command prints: tables for people, one JSON document for machines, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

WIDE_COLUMNS = 240
"""Where no terminal says how wide it is, nothing is cut off."""

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE_COLUMNS)
errors = Console(stderr=True, soft_wrap=True)


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--output", "-o", help="text for people, json for machines")]


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON would show it: proto field names, unset fields included."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print rows in aligned columns, nothing cut; `empty` is said instead of a table without rows."""
    listed = list(rows)
    if not listed:
        errors.print(empty, style="dim", highlight=False, markup=False)
        return
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *listed, strict=True)]
    for number, row in enumerate([columns, *listed]):
        cells = (set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        console.print(Text("  ".join(cells).rstrip(), style="" if number else "bold"), highlight=False)


def say(text: str) -> None:
    """Tell a person, in rich's markup, what is not the result: on stderr, and only where one is watching."""
    if errors.is_terminal:
        errors.print(text, highlight=False)

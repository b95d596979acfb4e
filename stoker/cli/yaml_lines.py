"""YAML as plain values that know their lines, so that a complaint can say where. Pure.

Only what a configuration needs is taken: one document of mappings, lists and scalars. Anchors, aliases and
deep nesting are refused (a few hundred bytes of aliases can stand for gigabytes), and keys given twice too.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from stoker.errors import InvalidRequest

MAX_CHARACTERS = 4_000_000
MAX_DEPTH = 16

Path = tuple[str | int, ...]
"""Keys and list positions from the document's root."""


@dataclass(slots=True, kw_only=True)
class Document:
    """A YAML document.

    Attributes:
        value: Mappings, lists and scalars.
        lines: Where each value or its key stands, from 1.
        source: Name of the file, for messages.
    """

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    source: str

    def where(self, path: Path) -> str:
        """Return `file:line` of a value, or of the nearest thing around it that has a line."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines.get(path, 1)}"


def read_yaml(text: str, source: str) -> Document:
    """Read one document.

    Raises:
        InvalidRequest: It is not YAML, or not the part of it that is taken; names file and line.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(f"{source}: more than {MAX_CHARACTERS} characters; split it into several files")
    document = Document(value=None, source=source)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.value = _plain(loader, node, (), document) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark is not None else 1
        raise InvalidRequest(f"{source}:{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # e.g. a control character, or the 31st of February
        raise InvalidRequest(f"{source}: {str(error).splitlines()[0]}") from error
    return document


class _Loader(yaml.SafeLoader):
    """Refuses aliases and depth while it composes, before anything is built of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not taken; write it out, or use `defaults`"
        elif self._depth >= MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        else:
            self._depth += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self._depth -= 1
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _plain(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, at), document) for at, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(loader, key_node)
            if key in found:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is given twice, first in line {document.lines[*path, key]}",
                    problem_mark=key_node.start_mark,
                )
            document.lines[*path, key] = key_node.start_mark.line + 1
            found[key] = _plain(loader, value_node, (*path, key), document)
        return found
    return loader.construct_object(node)


def _key(loader: _Loader, node: yaml.Node) -> str:
    key: Hashable = loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(key, str):
        raise yaml.MarkedYAMLError(
            problem="a key must be text; put it in quotes", problem_mark=node.start_mark
        )
    return key

"""The structure: import contracts hold, and generated code is not in git."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_stubs_are_not_in_git() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "stoker/v1"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert listed == ""


def test_every_proto_has_generated_typed_stubs() -> None:
    protos = {path.stem for path in (ROOT / "protos/stoker/v1").glob("*.proto")}

    typed = {path.stem.removesuffix("_pb2") for path in (ROOT / "stoker/v1").glob("*_pb2.pyi")}
    assert typed == protos


UNCOMMENTED_OK = ("syntax ", "package ", "import ", "option ", "oneof ", "reserved ", "}")
"""How lines begin that declare nothing of their own: a oneof's members speak for it."""


def bare_declarations(proto: str) -> list[str]:
    """Return the declarations of a proto (service, rpc, message, field, enum, value) that nothing explains.

    A declaration is explained by a comment at its end or on the line above. One line declares one thing, as
    in all our protos.
    """
    lines = ["", *(line.strip() for line in proto.splitlines())]
    return [
        line
        for above, line in itertools.pairwise(lines)
        if line and "//" not in line and not above.startswith("//") and not line.startswith(UNCOMMENTED_OK)
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "protos/stoker/v1").glob("*.proto")), ids=lambda path: path.name
)
def test_everything_a_proto_declares_is_explained(path: Path) -> None:
    assert bare_declarations(path.read_text()) == []


@pytest.mark.parametrize(
    "declaration",
    [
        "message Kettle {",
        "message Boiled {}",
        "enum Heat {",
        "HEAT_UNSPECIFIED = 0;",
        "service Kitchen {",
        "rpc Boil(Kettle) returns (stream Boiled);",
        "double water_litres = 1;",
        "repeated string cups = 2;",
        "optional uint32 degrees = 3;",
        "map<string, string> labels = 4;",
    ],
)
def test_a_declaration_without_a_comment_is_found(declaration: str) -> None:
    """The test above finds what it claims to find."""
    assert bare_declarations(declaration) == [declaration]
    assert bare_declarations(f"// Why.\n{declaration}") == []
    assert bare_declarations(f"{declaration}  // in litres") == []

"""The structure: what calls itself pure is pure, protos are explained, generated code is not in git."""

from __future__ import annotations

import ast
import itertools
import re
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


OUTSIDE_WORLD = frozenset(
    {"aiohttp", "asyncio", "fcntl", "grpc", "httpx", "logging", "mmap", "os", "prometheus_client"}
    | {
        "select",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "uuid",
        "uvicorn",
    }
)
"""Modules that read or change something which is not an argument; what decides imports none of them."""


def calls_itself_pure(module: ast.Module) -> bool:
    """Whether the first paragraph of a module's docstring promises: values in, values out."""
    paragraph = (ast.get_docstring(module) or "").split("\n\n", maxsplit=1)[0]
    return re.search(r"\bPure\b|, pure\b", paragraph) is not None


def imported(node: ast.AST) -> set[str]:
    """Return the top-level names of all modules imported below `node`, but for those only types come from."""
    names: set[str] = set()
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import():
                names |= {alias.name.partition(".")[0] for alias in child.names}
            case ast.ImportFrom(module=str(module)):
                names.add(module.partition(".")[0])
            case _:
                names |= imported(child)
    return names


def impurities(module: ast.Module) -> set[str]:
    """Return what a module imports of the outside world although it calls itself pure."""
    return imported(module) & OUTSIDE_WORLD if calls_itself_pure(module) else set()


def test_modules_that_call_themselves_pure_import_nothing_of_the_outside_world() -> None:
    paths = [path for top in ("stoker", "services") for path in (ROOT / top).rglob("*.py")]
    modules = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths if path.parent.name != "v1"
    }

    assert sum(map(calls_itself_pure, modules.values())) > 50
    assert {path: found for path, module in modules.items() if (found := impurities(module))} == {}


def test_a_clock_in_a_pure_module_is_found() -> None:
    """The test above finds what it claims to find."""
    clock = "def now():\n    import time\n    return time.time()\n"

    assert impurities(ast.parse(f'"""Decides. Pure."""\n{clock}')) == {"time"}
    assert impurities(ast.parse(f'"""Acts on what pure modules decide."""\n{clock}')) == set()

"""The structure: import contracts hold, and generated code is not in git."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

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


def test_every_rpc_of_the_protos_has_a_comment_above_it() -> None:
    bare = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "protos/stoker/v1").glob("*.proto"))
        for before, line in itertools.pairwise(path.read_text().splitlines())
        if line.strip().startswith("rpc ") and not before.strip().startswith("//")
    ]

    assert bare == []

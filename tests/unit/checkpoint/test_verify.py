"""Claims about finding damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint.convert import convert
from stoker.checkpoint.verify import verify
from stoker.errors import CheckpointInvalid
from stoker.units import MIB
from tests.unit.checkpoint.builders import filled, small_model, write_folder

BIG = {"model.embed_tokens.weight": filled("U8", 20 * MIB), "model.layers.0.x": filled("U8", 15 * MIB + 5)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of three chunks; a test that damages it puts it right again."""
    root = tmp_path_factory.mktemp("verify")
    return convert(write_folder(root / "src", BIG), root / "dst").path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_an_undamaged_checkpoint_is_right(converted: Path) -> None:
    seen: list[tuple[int, int]] = []

    report = verify(converted, lambda done, total: seen.append((done, total)), threads=2)

    assert report.ok
    assert report.digests_checked
    assert report.chunks_checked == 3 + 2
    assert seen[-1][0] == seen[-1][1] == (converted / "model.safetensors").stat().st_size


@pytest.mark.parametrize("offset", [0, 100, 16 * MIB - 1, 16 * MIB, 35 * MIB + 4096])
def test_one_flipped_bit_is_found_in_its_chunk(converted: Path, offset: int) -> None:
    path = converted / "model.safetensors"
    flip(path, offset)

    report = verify(converted)
    flip(path, offset)

    assert [(bad.file, bad.offset) for bad in report.bad] == [
        ("model.safetensors", offset // (16 * MIB) * 16 * MIB)
    ]


def test_every_bad_chunk_is_named(converted: Path) -> None:
    for offset in (5000, 33 * MIB):
        flip(converted / "model.safetensors", offset)

    report = verify(converted)
    for offset in (5000, 33 * MIB):
        flip(converted / "model.safetensors", offset)

    assert [bad.offset for bad in report.bad] == [0, 32 * MIB]
    assert not report.ok


def test_a_changed_small_file_is_named(tmp_path: Path) -> None:
    folder = convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst").path
    (folder / "config.json").write_text("{}")

    assert [bad.file for bad in verify(folder).bad] == ["config.json"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst").path
    (folder / "model.safetensors").write_bytes(b"x")

    with pytest.raises(CheckpointInvalid, match="was cut or changed"):
        verify(folder)


def test_in_place_only_the_structure_is_checked_and_the_report_says_so(tmp_path: Path) -> None:
    report = verify(write_folder(tmp_path / "m", small_model()))

    assert report.ok
    assert not report.digests_checked

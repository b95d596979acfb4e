"""Claims about conversion: equal tensors, aligned, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint import convert as convert_module
from stoker.checkpoint.convert import convert
from stoker.checkpoint.dtypes import DTYPE_BITS, TORCH_NAMES
from stoker.checkpoint.index import open_checkpoint, read_header
from stoker.checkpoint.layout import is_padding
from stoker.checkpoint.verify import verify
from stoker.errors import AlreadyExists, CheckpointInvalid, DiskFull, InvalidRequest, NotFound
from tests.unit.checkpoint.builders import LLAMA_CONFIG, Tensors, filled, small_model, write_folder

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight_scale",
    "model.layers.10.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
    "ünïcode/name",
    "odd",
)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Tensors, ...]:
    """Draw tensors of every dtype and shape, spread over one to three shards."""
    shards: list[Tensors] = [{} for _ in range(draw(st.integers(1, 3)))]
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 17), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape = [*shape, 4]
        shard = draw(st.sampled_from(shards))
        shard[name] = filled(dtype, *shape, seed=draw(st.integers(0, 250)))
    return tuple(shard for shard in shards if shard)


def stored(folder: Path) -> Tensors:
    """Return what a converted folder holds, read with nothing but its header."""
    header, _, _ = read_header(folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()[header.data_start :]
    return {
        entry.name: (entry.dtype, entry.shape, data[entry.begin : entry.end])
        for entry in header.tensors
        if not is_padding(entry.name)
    }


@settings(max_examples=120, deadline=None)
@given(shards=checkpoints())
def test_every_tensor_of_any_checkpoint_is_kept_bit_by_bit_and_aligned(shards: tuple[Tensors, ...]) -> None:
    """All dtypes, odd sizes, empty and 0-dimensional tensors, sharded sources; read by our own reader."""
    with tempfile.TemporaryDirectory() as root:
        index = convert(write_folder(Path(root, "src"), *shards), Path(root, "dst"))

        assert stored(index.path) == {name: tensor for shard in shards for name, tensor in shard.items()}
        assert all(tensor.offset % 256 == 0 for tensor in index.tensors)
        assert all(file.data_start % 4096 == 0 for file in index.files)
        assert verify(index.path).ok


@settings(max_examples=60, deadline=None)
@given(shards=checkpoints())
def test_the_safetensors_library_opens_the_result_and_every_tensor_is_equal(
    shards: tuple[Tensors, ...],
) -> None:
    """The same, read by the library, for every dtype that torch has."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    with tempfile.TemporaryDirectory() as root:
        index = convert(write_folder(Path(root, "src"), *shards), Path(root, "dst"))
        with safetensors.safe_open(index.files[0].path, "pt") as file:
            names = {name for name in file.keys() if not is_padding(name)}  # noqa: SIM118 - not a dict
            for shard in shards:
                for name, (dtype, _, data) in shard.items():
                    if dtype in TORCH_NAMES:
                        tensor = file.get_tensor(name)
                        assert tensor.dtype == getattr(torch, TORCH_NAMES[dtype])
                        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == data

        assert names == {name for shard in shards for name in shard}


def test_tensors_are_stored_in_the_order_of_execution(tmp_path: Path) -> None:
    index = convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst")

    assert [tensor.name for tensor in index.tensors] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tensors = small_model() | {"lm_head.weight": small_model()["model.embed_tokens.weight"]}
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}

    index = convert(write_folder(tmp_path / "src", tensors, config=config), tmp_path / "dst")

    assert index.tied_groups == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert "lm_head.weight" not in stored(index.path)
    again = convert(index.path, tmp_path / "again")
    assert again.tied_groups == index.tied_groups


def test_an_equal_head_that_is_not_tied_is_stored_twice(tmp_path: Path) -> None:
    tensors = small_model() | {"lm_head.weight": small_model()["model.embed_tokens.weight"]}
    config = {**LLAMA_CONFIG, "tie_word_embeddings": False}

    index = convert(write_folder(tmp_path / "src", tensors, config=config), tmp_path / "dst")

    assert stored(index.path) == tensors


def test_small_files_are_copied_verbatim(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    (src / "chat_template.jinja").write_bytes(b"{{ odd }}\r\n\xc3\xa9")
    (src / "README.md").write_text("not copied")

    index = convert(src, tmp_path / "dst")

    assert (index.path / "chat_template.jinja").read_bytes() == b"{{ odd }}\r\n\xc3\xa9"
    assert (index.path / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert not (index.path / "README.md").exists()


def test_the_revision_depends_on_content_and_not_on_sharding_or_place(tmp_path: Path) -> None:
    tensors = small_model()
    half = dict(list(tensors.items())[:2])
    rest = dict(list(tensors.items())[2:])

    one = convert(write_folder(tmp_path / "a", tensors), tmp_path / "dst-a")
    other = convert(write_folder(tmp_path / "b", half, rest), tmp_path / "dst-b")
    third = convert(write_folder(tmp_path / "c", small_model(seed=2)), tmp_path / "dst-c")

    assert one.revision == other.revision
    assert one.revision != third.revision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_rounds_as_torch_does_and_leaves_quantised_tensors_alone(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = {"q.weight": filled("F8_E4M3", 9), "ids": filled("I64", 3), "phase": filled("C64", 3)}
    tensors: Tensors = dict(kept)
    for name, source in (("F64", "float64"), ("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")):
        data = bytes(values.to(getattr(torch, source)).view(torch.uint8).numpy())
        tensors[f"layers.0.{name}"] = (name, (40, 7), data)

    index = convert(write_folder(tmp_path / "src", tensors), tmp_path / "dst", dtype=dtype)

    found = stored(index.path)
    for name, source in (("F64", "float64"), ("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")):
        expected = values.to(getattr(torch, source)).to(getattr(torch, dtype))
        assert found[f"layers.0.{name}"][2] == bytes(expected.view(torch.uint8).numpy())
    assert {name: found[name] for name in kept} == kept
    assert json.loads((index.path / "config.json").read_text())["dtype"] == dtype


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="bfloat16"):
        convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst", dtype="int4")


def test_nothing_is_converted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_folder(tmp_path / "src", small_model())
    first = convert(src, tmp_path / "dst")
    monkeypatch.setattr(convert_module, "open_source", lambda *_args, **_kwargs: pytest.fail("read again"))

    assert convert(src, tmp_path / "dst") == first


def test_a_source_that_was_only_copied_is_recognised(tmp_path: Path) -> None:
    first = convert(write_folder(tmp_path / "a", small_model()), tmp_path / "dst")
    copy = write_folder(tmp_path / "b", small_model())
    os.utime(copy / "model.safetensors", ns=(5, 5))

    assert convert(copy, tmp_path / "dst") == first


def test_another_source_or_dtype_is_refused_unless_overwritten(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    first = convert(write_folder(tmp_path / "a", small_model()), dst)
    other = write_folder(tmp_path / "b", small_model(seed=3))

    with pytest.raises(AlreadyExists, match="--overwrite"):
        convert(other, dst)
    assert open_checkpoint(dst) == first
    replaced = convert(other, dst, overwrite=True)

    assert replaced.revision != first.revision
    assert stored(dst) == small_model(seed=3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", "dst"}


def test_what_is_not_a_converted_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")

    with pytest.raises(AlreadyExists):
        convert(src, home, overwrite=True)

    assert (home / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_a_fine_destination(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()

    assert convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst").layout == "converted"


def test_a_damaged_destination_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    dst = convert(src, tmp_path / "dst").path
    (dst / "model.safetensors").write_bytes(b"cut")

    with pytest.raises(AlreadyExists, match="damaged"):
        convert(src, dst)

    assert verify(convert(src, dst, overwrite=True).path).ok


def test_source_and_destination_must_differ(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())

    with pytest.raises(InvalidRequest):
        convert(src, src, overwrite=True)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "dst", progress=interrupt)

    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def test_what_a_dead_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    left = tmp_path / "dst.partial-dead"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")

    convert(src, tmp_path / "dst")

    assert {entry.name for entry in tmp_path.iterdir()} == {"src", "dst"}


def test_a_second_conversion_to_the_same_place_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    refusals: list[str] = []

    def intrude(_done: int, _total: int) -> None:
        if not refusals:
            with pytest.raises(AlreadyExists) as caught:
                convert(src, tmp_path / "dst")
            refusals.append(caught.value.message)

    index = convert(src, tmp_path / "dst", progress=intrude)

    assert "Another conversion" in refusals[0]
    assert verify(index.path).ok


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())

    def touch(_done: int, _total: int) -> None:
        os.utime(src / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointInvalid, match="changed while"):
        convert(src, tmp_path / "dst", progress=touch)

    assert not (tmp_path / "dst").exists()


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = write_folder(tmp_path / "src", small_model())
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((*real[:3], 0, 0, *real[5:])))

    with pytest.raises(DiskFull, match=r"needs [\d,]+ bytes") as caught:
        convert(src, tmp_path / "dst")

    assert caught.value.details["need_bytes"] > sum(len(data) for _, _, data in small_model().values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", small_model())
    (tmp_path / "file").write_text("x")

    with pytest.raises(InvalidRequest, match="Cannot write"):
        convert(src, tmp_path / "file" / "dst")
    with pytest.raises(InvalidRequest, match="Cannot write"):
        convert(src, tmp_path / ("x" * 250))


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    index = convert(
        write_folder(tmp_path / "src", small_model()),
        tmp_path / "dst",
        progress=lambda done, total: seen.append((done, total)),
    )

    assert seen[-1] == (index.weight_bytes, index.weight_bytes)
    assert seen == sorted(seen)


def test_there_is_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")

    with pytest.raises(NotFound):
        convert(tmp_path / "nothing", tmp_path / "dst")
    with pytest.raises(CheckpointInvalid, match="holds no checkpoint"):
        convert(tmp_path / "empty", tmp_path / "dst")
    with pytest.raises(InvalidRequest, match="folder of the checkpoint"):
        convert(tmp_path / "file.txt", tmp_path / "dst")

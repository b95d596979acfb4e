"""Claims about opening checkpoints that someone else put there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.checkpoint.index import open_checkpoint
from stoker.checkpoint.small_files import read_small_files
from stoker.errors import CheckpointInvalid, NotFound
from tests.unit.checkpoint.builders import filled, safetensors_bytes, small_model, write_folder

SHARD_1 = {"model.embed_tokens.weight": filled("F32", 4, 2), "model.layers.0.x": filled("I8", 3)}
SHARD_2 = {"model.layers.1.x": filled("BOOL", 5), "lm_head.weight": filled("F32", 4, 2, seed=9)}


def hub_cache(root: Path) -> Path:
    """Lay a checkpoint out as huggingface_hub does: snapshots hold links into blobs."""
    plain = write_folder(root / "plain", small_model())
    model = root / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_a_single_file_is_served_in_place(tmp_path: Path) -> None:
    index = open_checkpoint(write_folder(tmp_path / "m", small_model()))

    assert index.layout == "in_place"
    assert {tensor.name for tensor in index.tensors} == small_model().keys()
    assert index.facts.architecture == "LlamaForCausalLM"
    assert (index.facts.context_length, index.facts.vocab_size) == (64, 32)
    assert index.small_files == ("config.json", "tokenizer_config.json")
    assert index.weight_bytes == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_a_tensors_bytes_lie_where_the_index_says(tmp_path: Path) -> None:
    index = open_checkpoint(write_folder(tmp_path / "m", SHARD_1, SHARD_2))

    paths = {file.name: file.path for file in index.files}
    for tensor in index.tensors:
        content = paths[tensor.file].read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert content == {**SHARD_1, **SHARD_2}[tensor.name][2]


def test_shards_are_served_in_place_with_their_layers(tmp_path: Path) -> None:
    index = open_checkpoint(write_folder(tmp_path / "m", SHARD_1, SHARD_2))

    assert [file.name for file in index.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert {tensor.name: tensor.layer for tensor in index.tensors} == {
        "model.embed_tokens.weight": None,
        "model.layers.0.x": 0,
        "model.layers.1.x": 1,
        "lm_head.weight": None,
    }
    assert index.dtype == "F32"


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)

    index = open_checkpoint(snapshot)

    assert index.files[0].path.parent.name == "blobs"
    assert read_small_files(snapshot).keys() == {"config.json", "tokenizer_config.json"}


def test_a_link_to_the_folder_itself_is_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    (tmp_path / "link").symlink_to(folder)

    assert open_checkpoint(tmp_path / "link").path == folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)

    with pytest.raises(CheckpointInvalid, match="leads out"):
        open_checkpoint(folder)


def test_a_fifo_is_refused_and_does_not_block(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match="regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", "a\x00.safetensors", 3],
)
def test_a_hostile_shard_name_is_refused(tmp_path: Path, shard: object) -> None:
    folder = write_folder(tmp_path / "m", SHARD_1, SHARD_2)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(SHARD_1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(CheckpointInvalid):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", SHARD_1, SHARD_2)
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointInvalid, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("left_bytes", [0, 5, 50, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, left_bytes: int) -> None:
    folder = write_folder(tmp_path / "m", SHARD_1, SHARD_2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left_bytes])

    with pytest.raises(CheckpointInvalid, match="model-00002-of-00002"):
        open_checkpoint(folder)


def test_a_shard_that_lacks_a_listed_tensor_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", SHARD_1, SHARD_2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(
        safetensors_bytes({"lm_head.weight": SHARD_2["lm_head.weight"]})
    )

    with pytest.raises(CheckpointInvalid, match=r"lacks the tensor 'model\.layers\.1\.x'"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", SHARD_1, {**SHARD_2, "model.layers.0.x": filled("I8", 3)})

    with pytest.raises(CheckpointInvalid, match="is in"):
        open_checkpoint(folder)


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_checkpoint(tmp_path / "nothing")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    (folder / "config.json").unlink()

    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_what_must_be_converted_first_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")

    with pytest.raises(CheckpointInvalid, match="stoker convert"):
        open_checkpoint(tmp_path)


def test_the_revision_in_place_follows_headers_sizes_times_and_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    revisions = [open_checkpoint(folder).revision, open_checkpoint(folder).revision]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    revisions.append(open_checkpoint(folder).revision)
    (folder / "config.json").write_text('{"architectures": ["Other"]}')
    revisions.append(open_checkpoint(folder).revision)

    assert revisions[0] == revisions[1]
    assert len(set(revisions)) == 3


def test_small_files_beyond_their_bound_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json"):
        read_small_files(folder)


def test_code_is_not_among_the_small_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", small_model())
    (folder / "modeling_evil.py").write_text("raise SystemExit")

    assert "modeling_evil.py" not in read_small_files(folder)


def test_reading_needs_neither_torch_nor_numpy_nor_transformers() -> None:
    code = (
        "import sys; import stoker.checkpoint.index, stoker.checkpoint.verify, stoker.checkpoint.convert; "
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("refusing", [(os, "open"), (Path, "resolve")])
def test_a_file_that_this_user_may_not_read_is_refused_with_who_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: tuple[object, str]
) -> None:
    """By the kernel's words: tests may run as root, whom nothing is refused."""
    folder = write_folder(tmp_path / "m", small_model())
    owner, call = refusing
    usual = getattr(owner, call)

    def refuse(path: object, *arguments: object, **named: object) -> object:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, *arguments, **named)

    monkeypatch.setattr(owner, call, refuse)

    with pytest.raises(
        CheckpointInvalid, match=rf"model\.safetensors .*user {os.geteuid()}.* lacks permission"
    ):
        open_checkpoint(folder)

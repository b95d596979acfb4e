"""What the store knows of checkpoints on the host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.store.catalog import Catalog, local_path
from services.store.messages import files_of
from stoker.checkpoint.convert import convert
from stoker.errors import CheckpointInvalid, InvalidRequest, NotFound
from tests.unit.loader.tiny_models import tiny_model
from tests.unit.services.store.checkpoints import write_checkpoint


@pytest.fixture
def catalog():
    made = Catalog(allowed_roots=())
    yield made
    made.close()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/models/a", "/models/a"),
        ("file:///models/a%20b", "/models/a b"),
        ("file://localhost/models/a", "/models/a"),
    ],
)
def test_absolute_paths_and_file_uris_name_folders(uri: str, path: str):
    assert local_path(uri) == Path(path)


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("hf://org/name", "the scheme hf://"),
        ("models/a", "a relative path"),
        ("file://otherhost/models/a", "the scheme file://"),
        ("", "a relative path"),
        ("/a\0b", "no path"),
    ],
)
def test_other_uris_are_refused_with_what_is_supported(uri: str, what: str):
    with pytest.raises(InvalidRequest, match=r"supported are absolute paths and file://") as raised:
        local_path(uri)
    assert what in raised.value.message


async def test_a_checkpoint_is_described_from_headers_and_config(catalog, tmp_path):
    folder = write_checkpoint(tmp_path / "m")

    info = (await catalog.open(f"file://{folder}")).info

    assert (info.uri, info.layout, info.weight_bytes, info.layers) == (str(folder), "in_place", 128, 1)
    assert info.file_bytes == (folder / "model.safetensors").stat().st_size
    assert (info.architecture, info.dtype, info.vocabulary_tokens) == ("LlamaForCausalLM", "uint8", 7)


async def test_tensors_come_in_execution_order(catalog, tmp_path):
    folder = write_checkpoint(tmp_path / "m", names=("lm_head.weight", "model.layers.0.w", "embed_tokens.w"))

    entry = await catalog.open(str(folder))

    assert [t.name for t in entry.tensors] == ["embed_tokens.w", "model.layers.0.w", "lm_head.weight"]


async def test_an_unchanged_checkpoint_is_not_opened_twice(catalog, tmp_path):
    folder = write_checkpoint(tmp_path / "m")

    assert await catalog.open(str(folder)) is await catalog.open(str(folder))


async def test_a_changed_checkpoint_is_opened_again(catalog, tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    before = await catalog.open(str(folder))
    os.utime(folder / "model.safetensors", ns=(1, 1))

    assert (await catalog.open(str(folder))).index.revision != before.index.revision


async def test_another_revision_than_asked_for_is_refused(catalog, tmp_path):
    folder = write_checkpoint(tmp_path / "m")

    with pytest.raises(CheckpointInvalid, match="asked for was old"):
        await catalog.open(str(folder), revision="old")


async def test_folders_outside_the_allowed_roots_are_refused_also_through_links(tmp_path):
    catalog = Catalog(allowed_roots=(tmp_path / "inside",))
    outside = write_checkpoint(tmp_path / "outside")
    inside = write_checkpoint(tmp_path / "inside" / "m")
    (tmp_path / "inside" / "link").symlink_to(outside)

    assert (await catalog.open(str(inside))).index.path == inside
    for uri in (str(outside), str(tmp_path / "inside" / "link"), f"{inside}/../../outside"):
        with pytest.raises(InvalidRequest, match="STOKER_STORE_ALLOWED_ROOTS"):
            await catalog.open(uri)
    catalog.close()


async def test_a_folder_that_is_not_there_is_not_found(catalog, tmp_path):
    with pytest.raises(NotFound):
        await catalog.open(str(tmp_path / "nothing"))


def cut_checkpoint(tmp_path: Path) -> Path:
    """A tiny llama in two ranks' files."""
    tiny_model("llama_tied").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2)
    return tmp_path / "cut"


async def test_a_cut_checkpoint_is_one_of_all_its_ranks(catalog, tmp_path):
    folder = cut_checkpoint(tmp_path)

    entry = await catalog.open(str(folder))

    files = ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors"]
    assert (entry.uri, entry.info.tensor_parallel) == (str(folder), 2)
    assert [file.name for file in entry.index.files] == files
    own = [[tensor for tensor in entry.tensors if tensor.file == file] for file in files]
    assert [tensor.name for tensor in own[0]] == [tensor.name for tensor in own[1]]
    assert entry.tensors == (*own[0], *own[1])
    assert entry.info.file_bytes == sum((folder / file).stat().st_size for file in files)


async def test_a_rank_uses_its_own_file_and_one_must_be_named(catalog, tmp_path):
    entry = await catalog.open(str(cut_checkpoint(tmp_path)))

    assert [files_of(entry, rank) for rank in (0, 1)] == [range(1), range(1, 2)]
    with pytest.raises(CheckpointInvalid, match="2 tensor-parallel ranks"):
        files_of(entry, None)
    with pytest.raises(InvalidRequest, match="no rank 2"):
        files_of(entry, 2)


async def test_a_checkpoint_in_one_piece_is_all_of_rank_0(catalog, tmp_path):
    entry = await catalog.open(str(write_checkpoint(tmp_path / "model", size=1000)))

    assert files_of(entry, None) == files_of(entry, 0) == range(1)
    assert entry.info.tensor_parallel == 0


async def test_adapters_are_refused_for_a_base_that_is_cut(catalog, tmp_path):
    folder = cut_checkpoint(tmp_path)

    with pytest.raises(CheckpointInvalid, match="adapters are added to checkpoints in one piece"):
        await catalog.describe_adapter(str(tmp_path / "any"), checkpoint_uri=str(folder))

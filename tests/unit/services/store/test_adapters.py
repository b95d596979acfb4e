"""What a store says of adapters, from headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from services.store.adapters import refuse_adapter
from services.store.catalog import Catalog, CatalogEntry, read_entry
from stoker.errors import CheckpointInvalid, InvalidRequest, NotFound

MODULE = "model.layers.0.self_attn.q_proj"


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    table, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(at))


def base(folder: Path, *, name: str = f"{MODULE}.weight", shape=(6, 4)) -> str:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {name: list(shape)})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return str(folder)


def lora(folder: Path, *, module: str = MODULE, out: int = 6) -> str:
    folder.mkdir()
    prefix = f"base_model.model.{module}"
    shapes = {f"{prefix}.lora_A.weight": [2, 4], f"{prefix}.lora_B.weight": [out, 2]}
    write_safetensors(folder / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def catalog():
    made = Catalog(allowed_roots=())
    yield made
    made.close()


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"name": "layers.0.self_attn.q_proj.weight"}, {"shape": (4, 6)}],
    ids=["as the adapter says", "saved without its head", "transposed"],
)
async def test_an_adapter_is_described_when_its_shapes_are_the_bases(catalog, tmp_path, checkpoint) -> None:
    folder = lora(tmp_path / "a")

    found = await catalog.describe_adapter(
        f"file://{folder}", checkpoint_uri=base(tmp_path / "m", **checkpoint)
    )

    assert (found.uri, found.rank, list(found.target_modules)) == (folder, 2, ["q_proj"])
    assert found.file_bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert found.revision


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"out": 5}, r"its weight is \[6, 4\], the adapter's \[5, 4\]"),
        ({"module": "model.layers.9.self_attn.q_proj"}, "no such module"),
    ],
)
async def test_an_adapter_for_another_base_is_refused(catalog, tmp_path, adapter, reason) -> None:
    with pytest.raises(CheckpointInvalid, match=reason):
        await catalog.describe_adapter(lora(tmp_path / "a", **adapter), checkpoint_uri=base(tmp_path / "m"))


async def test_an_adapter_that_is_not_there_or_not_allowed_is_refused(catalog, tmp_path) -> None:
    checkpoint = base(tmp_path / "m")
    with pytest.raises(NotFound):
        await catalog.describe_adapter(str(tmp_path / "none"), checkpoint_uri=checkpoint)
    with pytest.raises(InvalidRequest, match="s3://"):
        await catalog.describe_adapter("s3://bucket/a", checkpoint_uri=checkpoint)


class Far:
    """Folders as if they were elsewhere; see `OpensRemote`."""

    def __init__(self, **folders: str) -> None:
        self.folders = {f"http://origin/{name}": Path(folder) for name, folder in folders.items()}
        self.opened: list[str] = []

    def known_as(self, uri: str) -> str | None:
        """See `OpensRemote`."""
        return uri if uri in self.folders else None

    def open(self, uri: str, *, revision: str) -> CatalogEntry:
        """See `OpensRemote`."""
        assert not revision
        self.opened.append(uri)
        entry = read_entry(self.folders[uri])
        entry.info.uri = uri
        return entry

    def on_disk(self) -> list[CatalogEntry]:
        """See `OpensRemote`."""
        return []


@pytest.fixture
def catalog_with():
    made: list[Catalog] = []

    def make(**folders: str) -> Catalog:
        made.append(Catalog(allowed_roots=(), remote=Far(**folders)))
        return made[-1]

    yield make
    for catalog in made:
        catalog.close()


async def test_a_far_adapter_is_described_as_a_near_one_is_and_marked(catalog_with, tmp_path) -> None:
    folder, checkpoint = lora(tmp_path / "a"), base(tmp_path / "m")
    catalog = catalog_with(poet=folder)

    near = await catalog.describe_adapter(folder, checkpoint_uri=checkpoint)
    far = await catalog.describe_adapter("http://origin/poet", checkpoint_uri=checkpoint)

    assert (far.uri, far.far, near.far) == ("http://origin/poet", True, False)
    near.uri, near.far = far.uri, True
    assert far == near


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (
            {"out": 5},
            r"http://origin/poet is no adapter for .*weight is \[6, 4\], the adapter's \[5, 4\]",
        ),
        ({"module": "model.layers.9.self_attn.q_proj"}, "no such module"),
    ],
)
async def test_a_far_adapter_for_another_base_is_refused(catalog_with, tmp_path, adapter, reason) -> None:
    catalog = catalog_with(poet=lora(tmp_path / "a", **adapter))
    with pytest.raises(CheckpointInvalid, match=reason):
        await catalog.describe_adapter("http://origin/poet", checkpoint_uri=base(tmp_path / "m"))


async def test_a_whole_model_is_no_adapter_and_an_adapter_is_no_model(catalog_with, tmp_path) -> None:
    checkpoint = base(tmp_path / "m")
    catalog = catalog_with(model=checkpoint, poet=lora(tmp_path / "a"))

    with pytest.raises(CheckpointInvalid, match=r"holds a whole model .LlamaForCausalLM., no adapter"):
        await catalog.describe_adapter("http://origin/model", checkpoint_uri=checkpoint)
    with pytest.raises(CheckpointInvalid, match=r"is a LoRA adapter of .*deploy its base, with --adapter"):
        refuse_adapter(await catalog.open("http://origin/poet"))
    refuse_adapter(await catalog.open("http://origin/model"))


async def test_an_adapter_whose_config_says_another_rank_is_refused_where_it_is_opened(
    catalog_with, tmp_path
) -> None:
    folder = Path(lora(tmp_path / "a"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 2}')
    catalog = catalog_with(poet=str(folder))

    with pytest.raises(CheckpointInvalid, match="the config says rank 3"):
        await catalog.describe_adapter("http://origin/poet", checkpoint_uri=base(tmp_path / "m"))

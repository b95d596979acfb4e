"""What a store says of adapters, from headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from services.store.catalog import Catalog
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

"""Claims about pickles: tensors come over bit by bit, code does not run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from stoker.checkpoint.convert import convert
from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.errors import CheckpointInvalid
from tests.unit.checkpoint.builders import LLAMA_CONFIG

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def pickled(folder: Path, state: object, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **config}))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def loaded(folder: Path) -> dict[str, object]:
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("__stoker_pad__.")}


def bits(tensor: object) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(TORCH_NAMES))
def test_every_dtype_of_torch_is_kept(tmp_path: Path, name: str) -> None:
    raw = torch.randint(0, 2 if name == "BOOL" else 256, (48,), dtype=torch.uint8)
    state = {"layers.0.a": raw.view(getattr(torch, TORCH_NAMES[name])), "empty": torch.empty(0, 3)}

    index = convert(pickled(tmp_path / "src", state), tmp_path / "dst")

    found = loaded(index.path)
    assert found["layers.0.a"].dtype == state["layers.0.a"].dtype  # type: ignore[attr-defined]
    assert bits(found["layers.0.a"]) == bits(raw)


def test_views_and_scalars_come_over_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(base.clone()),
    }

    index = convert(pickled(tmp_path / "src", state), tmp_path / "dst")

    found = loaded(index.path)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.detach().resolve_conj())  # type: ignore[call-overload]


def test_shared_memory_that_nothing_would_tie_again_is_stored_for_each_name(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)

    index = convert(pickled(tmp_path / "src", {"layers.0.a": shared, "layers.1.a": shared}), tmp_path / "dst")

    assert torch.equal(loaded(index.path)["layers.0.a"], loaded(index.path)["layers.1.a"])  # type: ignore[call-overload]


def test_a_head_on_the_embeddings_memory_is_stored_once_where_the_config_ties(tmp_path: Path) -> None:
    shared = torch.randn(8, 4)
    state = {"model.embed_tokens.weight": shared, "lm_head.weight": shared}

    index = convert(pickled(tmp_path / "src", state, tie_word_embeddings=True), tmp_path / "dst")

    assert index.tied_groups == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert loaded(index.path).keys() == {"model.embed_tokens.weight"}


def test_shards_are_joined(tmp_path: Path) -> None:
    src = pickled(tmp_path / "src", {})
    (src / "pytorch_model.bin").unlink()
    for number in (1, 2):
        torch.save({f"layers.{number}.a": torch.full((3,), number)}, src / f"pytorch_model-{number}.bin")
    weight_map = {f"layers.{number}.a": f"pytorch_model-{number}.bin" for number in (1, 2)}
    (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    index = convert(src, tmp_path / "dst")

    assert [tensor.name for tensor in index.tensors] == ["layers.1.a", "layers.2.a"]


def test_the_old_format_is_read(tmp_path: Path) -> None:
    src = pickled(tmp_path / "src", {})
    torch.save({"a": torch.ones(3)}, src / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    assert torch.equal(loaded(convert(src, tmp_path / "dst").path)["a"], torch.ones(3))  # type: ignore[call-overload]


class Evil:
    """Would make a folder if it were unpickled with code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, protocol: str) -> None:
    src = pickled(tmp_path / "src", {"a": Evil(tmp_path / "ran")})
    if protocol == "pickle":
        (src / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}))

    with pytest.raises(CheckpointInvalid):
        convert(src, tmp_path / "dst")

    assert {entry.name for entry in tmp_path.iterdir()} == {"src"}


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"a": 1},
        {1: torch.ones(1)},
        {"../a": torch.ones(1)},
        {"a": torch.ones(2, dtype=torch.complex128)},
        {"a": torch.eye(2).to_sparse()},
    ],
    ids=["list", "number", "key", "path", "dtype", "sparse"],
)
def test_what_is_not_a_table_of_plain_tensors_is_refused(tmp_path: Path, state: object) -> None:
    with pytest.raises(CheckpointInvalid):
        convert(pickled(tmp_path / "src", state), tmp_path / "dst")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    src = pickled(tmp_path / "src", {})
    (src / "pytorch_model.bin").write_bytes(content)

    with pytest.raises(CheckpointInvalid, match=r"pytorch_model\.bin"):
        convert(src, tmp_path / "dst")

"""Checkpoints to load: Llama-shaped, filled with random bytes, made once and kept below a cache folder."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stoker.checkpoint.convert import convert
from stoker.units import MIB

ROWS = Path(__file__).with_name("loading_rows.py")
VOCABULARY = 32_000
_HEAD_DIMENSION = 64
_BF16_BYTES = 2
_HEADER_STEP = 8
"""The safetensors library pads its headers to this with spaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama of about some size."""

    hidden: int
    intermediate: int
    layers: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, as transformers calls them."""
        h, i = self.hidden, self.intermediate
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            found |= {f"{at}.self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
            found |= {f"{at}.mlp.{name}_proj.weight": (i, h) for name in ("gate", "up")}
            found[f"{at}.mlp.down_proj.weight"] = (h, i)
            found |= {f"{at}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        return found | {"model.norm.weight": (h,), "lm_head.weight": (VOCABULARY, h)}

    @property
    def config(self) -> dict[str, object]:
        """What transformers needs to build it."""
        heads = self.hidden // _HEAD_DIMENSION
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": _HEAD_DIMENSION,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


SHAPES = {
    "0.3": Shape(hidden=1024, intermediate=2816, layers=7),
    "3": Shape(hidden=2048, intermediate=5632, layers=28),
    "6": Shape(hidden=3072, intermediate=8192, layers=25),
}
"""By size in GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The same tensors in every form that a row needs."""

    plain: Path
    converted: Path
    pickled: Path
    tensorized: Path

    @property
    def plain_file(self) -> Path:
        """The weights as Hugging Face has them."""
        return self.plain / "model.safetensors"

    @property
    def converted_file(self) -> Path:
        """The weights as Stoker writes them."""
        return self.converted / "model.safetensors"

    @property
    def weight_files_there(self) -> tuple[Path, ...]:
        """Every large file that was made."""
        files = (self.plain_file, self.converted_file, self.pickled, self.tensorized)
        return tuple(file for file in files if file.exists())


def make(cache: Path, size: str, *, peers_python: Path | None) -> Checkpoint:
    """Return the checkpoint of a size, made where it is missing; minutes for the large ones, once.

    Args:
        cache: Folder that keeps them.
        size: A key of `SHAPES`.
        peers_python: Writes the forms of tensorizer and torch; None = those rows are left out.
    """
    folder = cache / f"{size}gb"
    plain = folder / "plain"
    converted = folder / "converted"
    found = Checkpoint(
        plain=plain,
        converted=converted,
        pickled=folder / "weights.pt",
        tensorized=folder / "weights.tensors",
    )
    if not (plain / "config.json").exists():
        print(f"# making the checkpoint of {size} GB below {folder.name}/ (once)", file=sys.stderr)
        plain.mkdir(parents=True, exist_ok=True)
        _write_random(found.plain_file, SHAPES[size].tensors)
        (plain / "config.json").write_text(json.dumps(SHAPES[size].config, indent=1))
    if not (converted / "stoker.json").exists():
        convert(plain, converted)
    if peers_python is not None and not (found.pickled.exists() and found.tensorized.exists()):
        paths = {
            "file": str(found.plain_file),
            "pickled": str(found.pickled),
            "tensorized": str(found.tensorized),
        }
        subprocess.run(
            [str(peers_python), str(ROWS), "write_other_formats", json.dumps(paths)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return found


def clean(cache: Path) -> None:
    """Remove everything that `make` made."""
    shutil.rmtree(cache, ignore_errors=True)


def _write_random(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + _BF16_BYTES * int(np.prod(shape))
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % _HEADER_STEP)
    generator = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for at in range(0, position, 16 * MIB):
            file.write(generator.bytes(min(16 * MIB, position - at)))

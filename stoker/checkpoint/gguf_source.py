"""Read a GGUF file through transformers, which dequantises it and rebuilds config and tokenizer.

Imports transformers: load this module only where a GGUF is converted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.checkpoint.pickle_source import shared_groups
from stoker.checkpoint.small_files import read_small_files
from stoker.checkpoint.tensor_bytes import planned, slices
from stoker.checkpoint.tensor_source import TensorSource
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


class GgufSource(TensorSource):
    """A GGUF file, dequantised.

    Memory: NOT bounded by slices. transformers builds the whole model, in float32 while it dequantises;
    expect the float32 size of the model, and more for a moment.
    """

    def __init__(self, file: Path, *, dtype: str | None) -> None:
        model, tokenizer = _load(file, getattr(torch, TORCH_NAMES[dtype or "F32"]))
        self._small = _rebuilt_files(model, tokenizer)
        self._state: dict[str, torch.Tensor] = {
            name: tensor.detach() for name, tensor in model.state_dict().items()
        }
        self.tensors = planned(self._state)
        self.tied_groups: tuple[tuple[str, ...], ...] = ()
        self.shared_groups = shared_groups(self._state)

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes from memory."""
        return slices(self._state[name])

    def small_files(self) -> dict[str, bytes]:
        """Return config, generation config, tokenizer and chat template as rebuilt from the GGUF."""
        return self._small

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._state.clear()


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the dequantised model and its tokenizer; the libraries' progress bars stay silent."""
    folder, name = str(file.parent), file.name
    try:
        with contextlib.redirect_stderr(io.StringIO()), _parsed_once():
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=dtype, **_dequantized()
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except ImportError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointInvalid(
            f"{file}: transformers cannot read this GGUF: {reason}. Use the model's safetensors checkpoint."
        ) from error
    packed = next((name for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8), None)
    if packed is not None:
        raise CheckpointInvalid(
            f"{file}: transformers left {packed!r} quantised; use the model's safetensors checkpoint."
        )
    return model, tokenizer


def _dequantized() -> dict[str, Any]:
    """Return what makes transformers 5.20 and later unpack every weight; older ones always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the file once, not thrice, and build its table of names once, not per module.

    Converting SmolLM2-135M (Q4_1) on two busy cores: 53 s without, 32 s with. Where transformers comes to
    import these otherwise, nothing breaks; it is only slow again.
    """
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def _rebuilt_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Return the small files; the config no longer calls itself quantised, generation knows where to end."""
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    generation = model.generation_config
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, field) is None:
            setattr(generation, field, getattr(tokenizer, field))
    with tempfile.TemporaryDirectory(prefix="stoker-gguf-") as folder:
        model.config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return read_small_files(Path(folder))

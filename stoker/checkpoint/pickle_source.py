"""Read `pytorch_model*.bin` through `torch.load(weights_only=True)`: tensors only, no code is run.

Imports torch: load this module only where a pickle is converted.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import warnings
from typing import TYPE_CHECKING, Any, Self

import torch

from stoker.checkpoint.safetensors_header import check_name
from stoker.checkpoint.small_files import read_small_files
from stoker.checkpoint.tensor_bytes import planned, slices
from stoker.checkpoint.tensor_source import TensorSource
from stoker.errors import CheckpointInvalid
from stoker.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_LIBC = ctypes.CDLL(None)
_MADV_PAGEOUT = 21
"""Linux 5.4 and later; older kernels refuse it, which changes nothing but the memory that is counted."""


class PickleSource(TensorSource):
    """Pickles, in one file or many.

    Memory: files in torch's zip format are mapped and their pages given back after each slice; files in the
    format from before torch 1.6 can only be read whole, all shards together. A tensor that is not contiguous
    is copied whole.
    """

    def __init__(self, folder: Path, weights: tuple[Path, ...]) -> None:
        self._folder = folder
        self._state: dict[str, torch.Tensor] = {}
        for path in weights:
            self._take(path, _load(path))
        self.tensors = planned(self._state)
        self.tied_groups: tuple[tuple[str, ...], ...] = ()
        self.shared_groups = shared_groups(self._state)

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes from the mapped file, giving pages back as they are passed."""
        for part in slices(self._state[name]):
            yield part
            _page_out(part)

    def small_files(self) -> dict[str, bytes]:
        """Return the folder's small files."""
        return read_small_files(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._state.clear()

    def _take(self, path: Path, loaded: Any) -> None:
        if not isinstance(loaded, dict):
            raise CheckpointInvalid(f"{path} holds a {type(loaded).__name__}, not a table of tensors.")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointInvalid(
                    f"{path}: {str(name)[:100]!r} is a {type(tensor).__name__}, not a tensor with a name; "
                    "save the model's state_dict alone."
                )
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                raise CheckpointInvalid(f"{path}: tensor {name!r} is sparse, quantised or empty of data.")
            if check_name(name, where=str(path)) in self._state:
                raise CheckpointInvalid(f"{path}: tensor {name!r} is in another file too.")
            self._state[name] = tensor.detach().resolve_conj().resolve_neg()


def shared_groups(state: dict[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Return the names that are the same view of the same memory."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            groups.setdefault(place, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old protocols: what counts is whether it loads
            return _load_mapped(path)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointInvalid(
            f"{path} is damaged or holds more than tensors, and a pickle that runs code is not read: "
            f"{reason}. Ask its author for safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointInvalid(f"{path} cannot be read: {reason}. Fetch the file again.") from error


def _load_mapped(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _page_out(part: memoryview) -> None:
    """Ask the kernel to reclaim the pages under `part` now; a hint, which loses no data wherever they are.

    Without it, what was read of a mapped file counts as this process's memory until somebody else needs it.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(part)) if part.nbytes and not part.readonly else 0
    begin = align_up(address, mmap.PAGESIZE)
    length = (address + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if address and length > 0:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_PAGEOUT)

"""`stoker.open`: look into a checkpoint and take what is needed, like `safe_open` on a folder."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any, Self

import torch

from stoker.checkpoint.torch_views import shaped
from stoker.errors import InvalidRequest, NotFound
from stoker.loader.daemon import AUTO
from stoker.loader.devices import device_named
from stoker.loader.sources import Source, StoredTensor, open_source

if TYPE_CHECKING:
    from types import TracebackType

_SHOWN_NAMES = 3
_COMPARED_NAMES = 5_000
"""With a name that is not there; a comparison takes some ten microseconds."""


def open_lazily(
    path: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    daemon: str | os.PathLike[str] | None = AUTO,
) -> Checkpoint:
    """Open a checkpoint without loading it.

    Reads headers only. From the disk, files are mapped: a tensor's bytes are read when they are touched,
    and cutting a file that is in use kills the process, as with every mapped file. From a daemon, a tensor
    is waited for when it is asked for.

    Example:
        with stoker.open("llama-3-8b") as checkpoint:
            norm = checkpoint.get_tensor("model.norm.weight")
            rows = checkpoint.get_slice("model.embed_tokens.weight")[:16]

    Args:
        path: A folder of safetensors, converted or not; with a daemon also a uri that it knows.
        device: Where tensors go.
        daemon: `auto` asks the store daemon of this host if there is one; a path names its attach socket
            or run folder; None asks nobody.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, or of a kind that must be converted first.
        InvalidRequest: There is no such device.
        PeerError: A daemon is needed or was named, and none answers.
    """
    return Checkpoint(open_source(path, daemon=daemon), device_named(device))


class Checkpoint:
    """An open checkpoint; a context manager. Tensors taken from it stay valid when it is closed.

    Not for several threads at once.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        """Args: source: taken over. device: where tensors go."""
        self._source: Source | None = source
        self._device = device
        self._alias = {name: group[0] for group in source.tied for name in group[1:]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files or of the lease; idempotent."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    @property
    def revision(self) -> str:
        """What changes when the checkpoint's bytes do."""
        return self._opened().revision

    def keys(self) -> list[str]:
        """Return the names of all tensors in execution order; names tied to another come last."""
        return [*self._opened().tensors, *self._alias]

    def metadata(self) -> dict[str, str]:
        """Return the files' free-form metadata."""
        return self._opened().metadata()

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; on the CPU it is the mapped memory, so nothing is read before it is touched.

        Raises:
            NotFound: There is no such tensor.
            LoadFailed: The daemon could not bring it.
        """
        source, place = self._place(name)
        data = source.data(place.name)
        if not place.nbytes:
            raw = torch.empty(0, dtype=torch.uint8)
        else:
            raw = torch.frombuffer(data, dtype=torch.uint8)
        return shaped(raw, dtype=place.dtype, shape=place.shape, name=name).to(self._device)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor to be indexed: only what is indexed is read and moved to the device.

        Raises:
            NotFound: There is no such tensor.
        """
        source, place = self._place(name)
        return TensorSlice(Checkpoint(source, torch.device("cpu")), place, self._device)

    def _place(self, name: str) -> tuple[Source, StoredTensor]:
        source = self._opened()
        place = source.tensors.get(self._alias.get(name, name))
        if place is None:
            near = difflib.get_close_matches(name, list(source.tensors)[:_COMPARED_NAMES], n=_SHOWN_NAMES)
            some = near or [*list(source.tensors)[:_SHOWN_NAMES], "…"]
            raise NotFound(
                f"{source.location} has no tensor {name!r}; it has {len(source.tensors):,}"
                f"{', near ones' if near else ''}: {', '.join(some)}"
            )
        return source, place

    def _opened(self) -> Source:
        if self._source is None:
            raise InvalidRequest("this checkpoint was closed; open it again")
        return self._source


class TensorSlice:
    """A tensor that is read where it is indexed."""

    def __init__(self, checkpoint: Checkpoint, place: StoredTensor, device: torch.device) -> None:
        """Args: checkpoint: a view of its own, on the CPU. place: the tensor. device: for the results."""
        self._checkpoint = checkpoint
        self._place = place
        self._device = device

    def get_shape(self) -> list[int]:
        """Return the element counts."""
        return list(self._place.shape)

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return self._place.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return a part, as indexing a tensor does."""
        return self._checkpoint.get_tensor(self._place.name)[index].to(self._device)

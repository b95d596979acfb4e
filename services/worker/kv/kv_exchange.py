"""Keys and values of one session, read out of an engine or written into one while it steps.

Theory of operation. What a store holds of a token never changes, so it can be read beside the engine's
steps: `KvReader` is made between two steps and read in another thread, piece by piece. Should the tokens lie
in a slot that is given back meanwhile (`SessionKv.place`), what was read is thrown away. `StagedKv` is room
in an engine's cache that no session uses yet: written in another thread, then handed to the session that
comes for it.

Shapes: L layers, K kv heads, T tokens of a piece, S tokens a store has room for, D head dim.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from services.worker.kv.kv_budget import kv_shape
from services.worker.kv.kv_format import ALL_TOKENS, SOME_HEADS, KvLayout
from stoker.errors import CapacityError, KvUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from services.worker.kv.kv_store import SessionKv

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RAW_DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "float32": (torch.int32, np.int32),
    "bfloat16": (torch.int16, np.int16),
    "float16": (torch.int16, np.int16),
}
"""Same size, and known to numpy, whose copies take one thread and leave the interpreter to others."""


def layout_of(config: Any, dtype: torch.dtype, *, engine: str, revision: str, ranks: int = 1) -> KvLayout:
    """Return the layout of a model's keys and values, from its transformers configuration.

    Args:
        config: Of the whole model.
        dtype: In which it computes.
        engine: Its name.
        revision: Of the checkpoint.
        ranks: Over how many processes the heads are dealt out: one of them can't ship what others have.
    """
    layers, kv_heads, head_dim = kv_shape(config)
    return KvLayout(
        revision=revision,
        engine=engine,
        cache=ALL_TOKENS if ranks == 1 else SOME_HEADS,
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


class KvReader:
    """The first tokens of a session's store. Made in the engine's thread, read in any one.

    Args:
        kv: The store.
        layout: What its pieces must be.
        tokens: The session's, as many as have keys and values.
        adapter: Identity of what was added to the model; two empty strings = nothing.

    Raises:
        KvUnavailable: The store isn't laid out like that.
    """

    def __init__(
        self, kv: SessionKv, layout: KvLayout, tokens: Sequence[int], adapter: tuple[str, str] = ("", "")
    ) -> None:
        layout.check_sendable()
        self.adapter = adapter
        self.layout = layout
        self.tokens = tuple(tokens)
        """Prompt and output, up to the last one that can be read."""
        self._kv = kv
        self._place = kv.place
        if kv.layer_count != layout.layers:
            raise KvUnavailable(f"{kv.layer_count} of {layout.layers} layers keep keys and values")
        self._layers = [kv.layer(layer) for layer in range(layout.layers)]
        for layer, layer_2KSD in enumerate(self._layers):
            _check(layer, layer_2KSD, layout)
        self._views = [_as_numpy(layer_2KSD, layout) for layer_2KSD in self._layers]
        self._buffer = np.empty(0, RAW_DTYPES[layout.dtype][1])

    def read(self, first: int, end: int) -> memoryview:
        """Return the bytes of the tokens from `first` to `end`; they are there until the next call.

        Raises:
            KvUnavailable: The store has moved, or the session has ended or was set back.
        """
        shape = self.layout.shape(end - first)
        count = math.prod(shape)
        if self._buffer.size < count:  # kept: fresh memory costs as much as the copy
            self._buffer = np.empty(count, self._buffer.dtype)
        out_L2TKD = self._buffer[:count].reshape(shape)
        with torch.inference_mode():
            for out_2TKD, layer_2KSD, view_2KSD in zip(out_L2TKD, self._layers, self._views, strict=True):
                if view_2KSD is None:
                    part_2KTD = _as_numpy(layer_2KSD[:, :, first:end].cpu(), self.layout)
                else:
                    part_2KTD = view_2KSD[:, :, first:end]
                np.copyto(out_2TKD, part_2KTD.transpose(0, 2, 1, 3))
        if self._kv.place != self._place:
            raise KvUnavailable("the session's keys and values moved or were given back while they were read")
        return out_L2TKD.reshape(-1).data.cast("B")


class StagedKv:
    """Room for a session that is on its way, and what has come of it.

    Extended and released in the engine's thread; written in any one, never in two at once.

    Args:
        kv: A store nobody uses.
        layout: Of the pieces.
        device: Where the store lies.
    """

    def __init__(self, kv: SessionKv, layout: KvLayout, device: torch.device) -> None:
        self.kv = kv
        self.layout = layout
        self.tokens = 0
        """Written so far, from the session's first one."""
        self._device = device
        self._layers: list[torch.Tensor] = []
        self._views: list[Any] = []

    def has_room(self, tokens: int) -> bool:
        """Say whether `tokens` tokens in all can be written without `extend`. Any thread, not beside it."""
        return bool(self._layers) and self.kv.has_room(tokens)

    def extend(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all.

        Raises:
            CapacityError: The cache has none.
        """
        if not self.kv.reserve(tokens):
            raise CapacityError(
                f"the key/value cache has no room for {tokens} tokens of a session that is moving here",
                retry_after_seconds=1.0,
            )
        shape = (2, self.layout.kv_heads, 1, self.layout.head_dim)
        like_2KTD = torch.empty(shape, dtype=DTYPES[self.layout.dtype], device=self._device)
        with torch.inference_mode():
            self._layers = self.kv.prepare(self.layout.layers, like_2KTD)
            self._views = [_as_numpy(layer_2KSD, self.layout) for layer_2KSD in self._layers]

    def write(self, data: bytes, tokens: int) -> None:
        """Append a piece of so many tokens; there must be room."""
        raw, raw_numpy = RAW_DTYPES[self.layout.dtype]
        in_L2TKD: Any = np.frombuffer(data, raw_numpy).reshape(self.layout.shape(tokens))
        first, end = self.tokens, self.tokens + tokens
        self.kv.note_written(end)  # before: whoever gives the room back makes all of it zero again
        with torch.inference_mode():
            for in_2TKD, layer_2KSD, view_2KSD in zip(in_L2TKD, self._layers, self._views, strict=True):
                in_2KTD = in_2TKD.transpose(0, 2, 1, 3)
                if view_2KSD is not None:
                    np.copyto(view_2KSD[:, :, first:end], in_2KTD)
                else:
                    layer_2KSD[:, :, first:end].view(raw).copy_(torch.from_numpy(in_2KTD.copy()))
        self.tokens = end

    def release(self) -> None:
        """Give the room back."""
        self._layers, self._views = [], []
        self.tokens = 0
        self.kv.release()


def _as_numpy(layer_2KSD: torch.Tensor, layout: KvLayout) -> Any:
    """Return a view for numpy; None where the memory isn't the host's."""
    return layer_2KSD.view(RAW_DTYPES[layout.dtype][0]).numpy() if layer_2KSD.device.type == "cpu" else None


def _check(layer: int, layer_2KSD: torch.Tensor, layout: KvLayout) -> None:
    found = (layer_2KSD.shape[1], layer_2KSD.shape[3], layer_2KSD.dtype)
    if found != (layout.kv_heads, layout.head_dim, DTYPES[layout.dtype]):
        raise KvUnavailable(
            f"layer {layer} keeps {found[0]} heads of {found[1]} numbers in {found[2]}, not "
            f"{layout.kv_heads} of {layout.head_dim} in {layout.dtype} as the model's other layers do"
        )

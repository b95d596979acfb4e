"""Keys and values: one store per session, within a budget of tokens for all of them.

A session begins in a slot of the pool if one is free: slots lie side by side, so that one attention call can
read the keys of several sessions in place. Beyond a slot's size, or where no slot is free, a session has a
contiguous store of its own. What it may use of it grows by whole blocks. On the CPU it has the addresses of
the longest context from the start, and memory only where tokens were written, so that nothing is copied as it
grows (51 MB at 1,100 tokens of SmolLM2: half a decode step); elsewhere each growth is a copy.

What no token was written to is zero, always: attention reads whole blocks and masks what lies behind a
session's last token, which removes numbers but not NaN.

Shapes: K kv heads, T new tokens, S tokens a store has room for, N slots, B some of them, D head dim,
P places.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

import heapq
import itertools
import math
import mmap

import torch

from services.worker.engine.protocol import KvExport
from stoker.units import align_up

BLOCK_TOKENS = 128
"""Granularity of growth and of the budget."""
SEEN_TOKENS = 64
"""Granularity of attention over sessions that fit a slot. A block is a whole number of these."""
SLOT_TOKENS = 512
"""Room of a slot. Longer sessions' attention is long enough for a call of its own."""

MAX_SEEN = 8192
"""Views remembered at most: those of some steps, in which every layer has one for each attention call."""


class KvPool:
    """Equal slots for short sessions, in host memory that is touched only where tokens are written.

    Args:
        slots: How many.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(slots))
        self._layers: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: dict[tuple[int, int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self) -> int | None:
        """Return the lowest free slot, or None."""
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int, written_tokens: int) -> None:
        """Free a slot and make it zero again."""
        with torch.inference_mode():
            for layer_2NKSD in self._layers.values():
                layer_2NKSD[:, slot, :, :written_tokens] = 0
        heapq.heappush(self._free, slot)

    def layer(self, layer: int, like_2KTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's [2, N, K, S, D], made at the first call in the dtype and shape of `like_2KTD`."""
        made = self._layers.get(layer)
        if made is None:
            shape = (2, self._slots, like_2KTD.shape[1], SLOT_TOKENS, like_2KTD.shape[3])
            made = self._layers[layer] = _untouched(shape, like_2KTD.dtype)
        return made

    def places(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a written layer's keys and values as [P, D] each: a place per slot, head and token."""
        places = self._places.get(layer)
        if places is None:
            keys_NKSD, values_NKSD = self._layers[layer]
            width = keys_NKSD.shape[-1]
            places = self._places[layer] = keys_NKSD.view(-1, width), values_NKSD.view(-1, width)
        return places

    def seen(self, layer: int, slot: int, count: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `tokens` keys and values of `count` slots of a written layer, [B, K, S, D] each.

        Views, remembered: a decode step asks for the one before's, until a session has another block.
        """
        key = (layer, slot, count, tokens)
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= MAX_SEEN:
                self._seen.clear()
            keys_BKSD, values_BKSD = self._layers[layer][:, slot : slot + count, :, :tokens]
            seen = self._seen[key] = keys_BKSD, values_BKSD
        return seen


class KvBudget:
    """Counts the KV tokens that all sessions of an engine have allocated.

    Args:
        max_tokens: Bound.
        slots: Slots of the pool; they are part of the bound, whether used or not.
        longest_tokens: A store of its own never has to hold more; 0 = nobody knows.

    Attributes:
        changes: Stores that took room (their number, and for how many tokens) or gave it back (0), in order,
            for ranks that do the same; whoever reads them empties the list. None: nobody does.
    """

    def __init__(self, max_tokens: int, slots: int = 0, longest_tokens: int = 0) -> None:
        self.pool = KvPool(slots)
        self.slots = slots
        self.max_tokens = max_tokens
        self.changes: list[tuple[int, int]] | None = None
        self._numbers = itertools.count()
        self.longest_tokens = longest_tokens
        self.max_own_tokens = max_tokens - slots * SLOT_TOKENS
        self.used_tokens = 0
        """Slots in use count whole."""
        self.own_tokens = 0
        """Of sessions with a store of their own."""

    def next_number(self) -> int:
        """Return the number of a new store. Any thread."""
        return next(self._numbers)

    def note(self, store: int, tokens: int) -> None:
        """Take note of a store's change; see `changes`."""
        if self.changes is not None:
            self.changes.append((store, tokens))


class SessionKv:
    """The keys and values of one session, layer by layer, allocated as layers first write.

    The tensors live where the model's keys come from. Keys and values of a layer are one tensor of shape
    [2, K, S, D], so that storing a token is one copy.

    Attributes:
        number: Tells it from the budget's other stores.
        slot: Its slot in the pool, if it has one.
        place: Counts up before its slot is given back: what somebody reads from there meanwhile is worthless.
            A store of its own stays as it is for whoever reads it, wherever the session goes.
    """

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self.number = budget.next_number()
        self.place = 0
        self._capacity = 0
        self._written = 0
        self._layers: dict[int, torch.Tensor] = {}
        self.slot: int | None = None

    @property
    def pool(self) -> KvPool:
        """Return the pool that its slot, if any, belongs to."""
        return self._budget.pool

    @property
    def layer_count(self) -> int:
        """Return how many layers have written."""
        return len(self._layers)

    def has_room(self, tokens: int) -> bool:
        """Say whether there is room for `tokens` tokens in all. Any thread, not while that changes."""
        return tokens <= self._capacity

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; return False, changing nothing, if the budget has none."""
        if tokens <= self._capacity:
            return True
        budget = self._budget
        if self._capacity == 0 and tokens <= SLOT_TOKENS and (slot := budget.pool.take()) is not None:
            self.slot, self._capacity = slot, SLOT_TOKENS
            budget.used_tokens += SLOT_TOKENS
            budget.note(self.number, tokens)
            return True
        if tokens > budget.max_own_tokens:
            return False
        capacity = min(align_up(tokens, BLOCK_TOKENS), budget.max_own_tokens)
        own = 0 if self.slot is not None else self._capacity
        if budget.own_tokens + capacity - own > budget.max_own_tokens:
            return False
        old_slot = self.slot
        with torch.inference_mode():
            for layer, old_2KSD in self._layers.items():
                self._layers[layer] = self._with_room(old_2KSD, capacity)
        budget.used_tokens += capacity - self._capacity
        budget.own_tokens += capacity - own
        budget.note(self.number, tokens)
        self._capacity, self.slot = capacity, None
        if old_slot is not None:
            self.place += 1
            budget.pool.give_back(old_slot, self._written)
        return True

    def layer(self, layer: int) -> torch.Tensor:
        """Return a layer's whole store [2, K, S, D]."""
        return self._layers[layer]

    def note_written(self, tokens: int) -> None:
        """Remember that up to `tokens` tokens were written, by `write` or into the slot."""
        self._written = max(self._written, tokens)

    def prepare(self, layers: int, like_2KTD: torch.Tensor) -> list[torch.Tensor]:
        """Make all layers' stores as the model would at its first tokens; return them, [2, K, S, D] each.

        Args:
            layers: How many.
            like_2KTD: Their dtype, device and shape; T doesn't matter.
        """
        for layer in range(layers):
            if layer not in self._layers:
                self.write(layer, 0, like_2KTD[:, :, :0])
        return [self._layers[layer] for layer in range(layers)]

    def write(self, layer: int, start: int, kv_2KTD: torch.Tensor) -> torch.Tensor:
        """Store T tokens from `start` on; return a view [2, K, start + T, D] of all up to the last."""
        store_2KSD = self._layers.get(layer)
        if store_2KSD is None:
            if self.slot is not None:
                store_2KSD = self._budget.pool.layer(layer, kv_2KTD)[:, self.slot]
            else:
                store_2KSD = self._own_store(kv_2KTD, self._capacity)
            self._layers[layer] = store_2KSD
        end = start + kv_2KTD.shape[2]
        self.note_written(end)
        store_2KSD[:, :, start:end] = kv_2KTD
        return store_2KSD[:, :, :end]

    def release(self) -> None:
        """Give everything back."""
        budget = self._budget
        if self._capacity:
            budget.note(self.number, 0)
        budget.used_tokens -= self._capacity
        if self.slot is None:
            budget.own_tokens -= self._capacity
        else:
            self.place += 1
            budget.pool.give_back(self.slot, self._written)
        self.slot, self._capacity, self._written = None, 0, 0
        self._layers.clear()

    def export(self, tokens: int) -> KvExport:
        """Copy the first `tokens` tokens to the CPU."""
        layers = tuple(
            # clone, for the copy would otherwise be the live store when its capacity is exactly `tokens`
            self._layers[layer][:, :, :tokens].to("cpu").clone(memory_format=torch.contiguous_format)
            for layer in sorted(self._layers)
        )
        return KvExport(token_count=tokens, layers=layers)

    def load(self, export: KvExport, tokens: int, device: torch.device) -> None:
        """Write the first `tokens` tokens of an export; room must have been reserved."""
        for layer, kv_2KTD in enumerate(export.layers):
            self.write(layer, 0, kv_2KTD[:, :, :tokens].to(device))

    def _with_room(self, old_2KSD: torch.Tensor, capacity: int) -> torch.Tensor:
        """Return a layer's store with room for so many tokens, outside of the pool."""
        if self.slot is None and old_2KSD.shape[2] >= align_up(capacity, BLOCK_TOKENS):
            return old_2KSD
        new_2KSD = self._own_store(old_2KSD, capacity)
        new_2KSD[:, :, : self._written] = old_2KSD[:, :, : self._written]
        return new_2KSD

    def _own_store(self, like_2KTD: torch.Tensor, capacity: int) -> torch.Tensor:
        room = align_up(capacity, BLOCK_TOKENS)  # attention reads whole blocks
        heads, width = like_2KTD.shape[1], like_2KTD.shape[3]
        if like_2KTD.device.type != "cpu":
            return like_2KTD.new_zeros((2, heads, room, width))
        room = max(room, align_up(self._budget.longest_tokens, BLOCK_TOKENS))
        return _untouched((2, heads, room, width), like_2KTD.dtype)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take no memory until they are written to."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

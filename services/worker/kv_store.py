"""Keys and values: one contiguous store per session, within a budget of tokens for all of them.

A session's store grows by whole blocks. Contiguous, because attention runs session by session and then needs
no gather; the copy at each growth costs less than a hundredth of the decode steps in between.

Shapes: K kv heads, T new tokens, S tokens a store has room for, D head dim.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

import torch

from services.worker.engine import KvExport
from stoker.units import align_up

BLOCK_TOKENS = 128
"""Granularity of growth and of the budget."""


class KvBudget:
    """Counts the KV tokens that all sessions of an engine have allocated."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.used_tokens = 0


class SessionKv:
    """The keys and values of one session, layer by layer, allocated as layers first write.

    The tensors live where the model's keys come from. Keys and values of a layer are one tensor of shape
    [2, K, S, D], so that storing a token is one copy.
    """

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._capacity = 0
        self._layers: dict[int, torch.Tensor] = {}

    @property
    def layer_count(self) -> int:
        """Return how many layers have written."""
        return len(self._layers)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; return False, changing nothing, if the budget has none."""
        if tokens <= self._capacity:
            return True
        if tokens > self._budget.max_tokens:
            return False
        capacity = min(align_up(tokens, BLOCK_TOKENS), self._budget.max_tokens)
        if self._budget.used_tokens + capacity - self._capacity > self._budget.max_tokens:
            return False
        self._budget.used_tokens += capacity - self._capacity
        for layer, old_2KSD in self._layers.items():
            new_2KSD = old_2KSD.new_empty((*old_2KSD.shape[:2], capacity, old_2KSD.shape[3]))
            new_2KSD[:, :, : self._capacity] = old_2KSD
            self._layers[layer] = new_2KSD
        self._capacity = capacity
        return True

    def write(self, layer: int, start: int, kv_2KTD: torch.Tensor) -> torch.Tensor:
        """Store T tokens from `start` on; return a view [2, K, start + T, D] of all up to the last."""
        store_2KSD = self._layers.get(layer)
        if store_2KSD is None:
            shape = (2, kv_2KTD.shape[1], self._capacity, kv_2KTD.shape[3])
            store_2KSD = self._layers[layer] = kv_2KTD.new_empty(shape)
        end = start + kv_2KTD.shape[2]
        store_2KSD[:, :, start:end] = kv_2KTD
        return store_2KSD[:, :, :end]

    def release(self) -> None:
        """Give everything back."""
        self._budget.used_tokens -= self._capacity
        self._capacity = 0
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

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

    def has_room(self, tokens: int) -> bool:
        """Say whether a new session of `tokens` tokens fits now."""
        return self.used_tokens + align_up(tokens, BLOCK_TOKENS) <= self.max_tokens


class SessionKv:
    """The keys and values of one session, layer by layer, allocated as layers first write.

    The tensors live where the model's keys come from.
    """

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._capacity = 0
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; return False, changing nothing, if the budget has none."""
        capacity = align_up(tokens, BLOCK_TOKENS)
        if capacity <= self._capacity:
            return True
        if self._budget.used_tokens + capacity - self._capacity > self._budget.max_tokens:
            return False
        self._budget.used_tokens += capacity - self._capacity
        for store in (self._keys, self._values):
            for layer, old in store.items():
                store[layer] = self._enlarged(old, capacity)
        self._capacity = capacity
        return True

    def write(
        self, layer: int, start: int, k_KTD: torch.Tensor, v_KTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store tokens from `start` on; return views of all keys and values up to the last one written."""
        if layer not in self._keys:
            self._keys[layer] = k_KTD.new_empty((k_KTD.shape[0], self._capacity, k_KTD.shape[2]))
            self._values[layer] = v_KTD.new_empty((v_KTD.shape[0], self._capacity, v_KTD.shape[2]))
        end = start + k_KTD.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, start:end] = k_KTD
        values[:, start:end] = v_KTD
        return keys[:, :end], values[:, :end]

    def release(self) -> None:
        """Give everything back."""
        self._budget.used_tokens -= self._capacity
        self._capacity = 0
        self._keys.clear()
        self._values.clear()

    def export(self, tokens: int) -> KvExport:
        """Copy the first `tokens` tokens to the CPU."""
        layers = sorted(self._keys)
        return KvExport(
            token_count=tokens,
            layer_keys=tuple(_copy(self._keys[layer], tokens) for layer in layers),
            layer_values=tuple(_copy(self._values[layer], tokens) for layer in layers),
        )

    def load(self, export: KvExport, tokens: int, device: torch.device) -> None:
        """Write the first `tokens` tokens of an export; room must have been reserved."""
        for layer, (keys, values) in enumerate(zip(export.layer_keys, export.layer_values, strict=True)):
            self.write(layer, 0, keys[:, :tokens].to(device), values[:, :tokens].to(device))

    @staticmethod
    def _enlarged(old_KSD: torch.Tensor, capacity: int) -> torch.Tensor:
        new_KSD = old_KSD.new_empty((old_KSD.shape[0], capacity, old_KSD.shape[2]))
        new_KSD[:, : old_KSD.shape[1]] = old_KSD
        return new_KSD


def _copy(store_KSD: torch.Tensor, tokens: int) -> torch.Tensor:
    # clone, for `contiguous` returns the live store itself when its capacity is exactly `tokens`
    return store_KSD[:, :tokens].to("cpu").clone(memory_format=torch.contiguous_format)

"""Any rank but the first: makes the passes that rank 0 makes, on its own pieces and its own stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engine.forward import Chunk, ModelRunner
from services.worker.engine.numerics import numerics
from services.worker.kv.kv_store import KvBudget, SessionKv
from stoker.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from stoker.v1.rank_group_pb2 import KvChange, RankBegin, RankOrder, RankPart, RankPass


class Follower:
    """One rank's model and stores. Belongs to one thread.

    Args:
        model: This rank's pieces, with their weights.
        engine: Name of the engine, for the numerics.
        ranks: How many there are.
        prefill_chunk_tokens: Where rank 0 cuts prompts.
    """

    def __init__(self, model: nn.Module, *, engine: str, ranks: int, prefill_chunk_tokens: int) -> None:
        self._runner = ModelRunner(model, None)
        self._budget: KvBudget | None = None
        self._stores: dict[int, SessionKv] = {}
        self._numerics = numerics(
            engine=engine,
            dtype=self._runner.dtype,
            device=self._runner.device,
            group_rows=self._runner.group_rows,
            prefill_group_rows=self._runner.prefill_group_rows,
            prefill_chunk_tokens=prefill_chunk_tokens,
            ranks=ranks,
        )

    @property
    def store_count(self) -> int:
        """Return how many sessions have keys and values here."""
        return len(self._stores)

    def follow(self, orders: Iterable[RankOrder]) -> None:
        """Do what rank 0 says, until it says nothing more.

        Raises:
            PeerError: It computes in another way, or says what makes no sense here: the ranks lost step.
            RuntimeError: A collective failed: a rank is gone.
        """
        for order in orders:
            match order.WhichOneof("order"):
                case "begin":
                    self._begin(order.begin)
                case "make":
                    self._make(order.make)
                case _:
                    raise PeerError("rank 0 sent an order that this version does not know")

    def _begin(self, begin: RankBegin) -> None:
        if begin.numerics != self._numerics:
            raise PeerError(f"rank 0 computes as {begin.numerics!r}, this rank as {self._numerics!r}")
        slots = begin.kv_slots
        self._budget = KvBudget(begin.kv_tokens, slots, begin.longest_tokens)

    def _make(self, told: RankPass) -> None:
        with torch.inference_mode():
            for change in told.changes:
                self._change(change)
            parts = [(part, self._store(part)) for part in told.parts]
            if told.decode:
                self._decode(parts)
            else:
                self._runner.prefill(
                    [
                        Chunk(kv=kv, start=part.start, tokens=part.token_ids, needs_logits=part.needs_logits)
                        for part, kv in parts
                    ]
                )

    def _decode(self, parts: Sequence[tuple[RankPart, SessionKv]]) -> None:
        self._runner.decode(
            [(kv, part.start, part.token_ids[0]) for part, kv in parts],
            [row for row, (part, _) in enumerate(parts) if part.needs_logits],
            [None] * len(parts),
        )

    def _change(self, change: KvChange) -> None:
        if self._budget is None:
            raise PeerError("rank 0 sent a pass before it said how it computes")
        if change.tokens:
            kv = self._stores.setdefault(change.store, SessionKv(self._budget))
            if not kv.reserve(change.tokens):
                raise PeerError(f"this rank has no room for {change.tokens} tokens, which rank 0 has")
        elif (released := self._stores.pop(change.store, None)) is not None:
            released.release()

    def _store(self, part: RankPart) -> SessionKv:
        kv = self._stores.get(part.store)
        if kv is None:
            raise PeerError(f"rank 0 feeds a session that has no room here (store {part.store})")
        return kv

"""The first rank's passes: told to the other ranks, then made.

Theory of operation. Only rank 0 has an engine: sessions, queues, clocks and the choice of tokens are its own.
All that another rank needs is which tokens of which session a pass feeds, and what became of the sessions'
stores of keys and values since the pass before; it makes the same pass on its pieces, and the parts meet in
the sums of the pass itself. So ranks can't choose differently, and a session that is cancelled, held, set
back or resumed is nothing special to them. A pass that was told is made: where weights are still on their way
it waits for them, and nothing interrupts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engine.forward import ModelRunner
from stoker.v1.rank_group_pb2 import KvChange, RankBegin, RankOrder, RankPart, RankPass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.engine.forward import Chunk
    from services.worker.engine.sampling import Floats
    from services.worker.kv.kv_store import KvBudget, SessionKv
    from services.worker.ranks.order_socket import OrderSender


class LeadingRunner(ModelRunner):
    """Runs one model's forward passes together with other ranks.

    Args:
        model: This rank's pieces.
        group_rows: See `ModelRunner`.
        sender: Has the other ranks.
        ranks: How many there are, this one included.
    """

    def __init__(self, model: nn.Module, group_rows: int | None, sender: OrderSender, ranks: int) -> None:
        super().__init__(model, group_rows)
        self.ranks = ranks
        self._sender = sender
        self._changes: list[tuple[int, int]] = []

    def begin(self, numerics: str, budget: KvBudget) -> None:
        """Tell the other ranks how this one computes; before the first pass.

        Args:
            numerics: Of the engine.
            budget: Its stores of keys and values.

        Raises:
            PeerError: A rank is gone.
        """
        budget.changes = self._changes
        begin = RankBegin(
            numerics=numerics,
            kv_tokens=budget.max_tokens,
            kv_slots=budget.slots,
            longest_tokens=budget.longest_tokens,
        )
        self._sender.send(RankOrder(begin=begin))

    def decode(
        self,
        rows: Sequence[tuple[SessionKv, int, int]],
        logits_of: Sequence[int],
        adapters: Sequence[AdapterWeights | None],
    ) -> list[Floats]:
        """See `ModelRunner`.

        Raises:
            PeerError: A rank is gone.
        """
        wanted = set(logits_of)
        self._tell(
            decode=True,
            parts=[
                RankPart(store=kv.number, start=index, token_ids=[token], needs_logits=row in wanted)
                for row, (kv, index, token) in enumerate(rows)
            ],
        )
        return super().decode(rows, logits_of, adapters)

    def prefill(self, chunks: Sequence[Chunk]) -> list[Floats | None]:
        """See `ModelRunner`.

        Raises:
            PeerError: A rank is gone.
        """
        self._tell(
            decode=False,
            parts=[
                RankPart(
                    store=chunk.kv.number,
                    start=chunk.start,
                    token_ids=chunk.tokens,
                    needs_logits=chunk.needs_logits,
                )
                for chunk in chunks
            ],
        )
        return super().prefill(chunks)

    def close(self) -> None:
        """Let go of the model; the other ranks end."""
        super().close()
        self._sender.close()

    def _tell(self, *, decode: bool, parts: list[RankPart]) -> None:
        changes = [KvChange(store=number, tokens=tokens) for number, tokens in self._changes]
        self._changes.clear()
        self._sender.send(RankOrder(make=RankPass(changes=changes, decode=decode, parts=parts)))

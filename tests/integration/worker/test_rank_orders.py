"""Orders of the first rank to the others, over a real unix socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.worker.ranks import order_socket
from services.worker.ranks.order_socket import OrderReader, OrderSender
from stoker.errors import PeerError
from stoker.v1.rank_group_pb2 import RankBegin, RankOrder


def test_orders_come_to_every_rank_in_their_order_until_the_first_rank_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "w.rank"
    sender = OrderSender(path)
    readers = [OrderReader(path) for _ in range(2)]
    sender.accept(2)
    assert not path.exists()

    orders = [RankOrder(begin=RankBegin(numerics="x" * length)) for length in (1, 100_000, 3)]
    with ThreadPoolExecutor() as threads:
        reading = [threads.submit(lambda reader=reader: list(reader.orders())) for reader in readers]
        for order in orders:
            sender.send(order)
        sender.close()
        assert [each.result(timeout=60) for each in reading] == [orders, orders]
    for reader in readers:
        reader.close()


def test_a_rank_that_has_gone_is_an_error_at_the_next_orders(tmp_path: Path) -> None:
    sender = OrderSender(tmp_path / "w.rank")
    reader = OrderReader(tmp_path / "w.rank")
    sender.accept(1)
    reader.close()

    with pytest.raises(PeerError, match="rank of this replica is gone"):
        sender.send(RankOrder(begin=RankBegin()))
    sender.close()


def test_ranks_that_do_not_come_are_an_error_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_socket, "JOIN_SECONDS", 0.01)
    sender = OrderSender(tmp_path / "w.rank")

    with pytest.raises(PeerError, match="0 of 1 ranks connected"):
        sender.accept(1)
    with pytest.raises(PeerError, match="does not listen"):
        OrderReader(tmp_path / "w.rank")

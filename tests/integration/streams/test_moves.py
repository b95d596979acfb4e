"""A session that moves while it runs, and whatever dies meanwhile: the client sees the same bits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.gateway.text.model_text import ModelText
from stoker.errors import Fenced
from stoker.v1.session_pb2 import GenerateRequest
from tests.integration.streams.cluster import Cluster, Event, Node
from tests.integration.streams.engines import Answer, NewEngine, Replicas, answer
from tests.unit.services.gateway.builders import replica

PROMPT = [(7 * i) % 200 + 20 for i in range(40)]
HOW = {
    "temperature": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "max_tokens": 90,
    "top_logprobs": 2,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def wanted(new_engine: NewEngine, text: ModelText) -> Answer:
    return asyncio.run(answer(Replicas(new_engine), text, PROMPT, **HOW))


def leave_at(*positions: int) -> Callable[..., None]:
    """Ask the session's owner to let it go once it has given so many tokens."""
    left = list(positions)

    def happening(cluster: Cluster, node: Node, order: object, event: Event) -> None:
        if left and event.position >= left[0] and event.tokens:
            left.pop(0)
            node.ask_to_leave()

    return happening


@pytest.mark.parametrize("position", [0, 40])
async def test_a_planned_move_changes_nothing(
    new_engine: NewEngine, text: ModelText, wanted: Answer, position: int
) -> None:
    async with Cluster(new_engine, leave_at(position)) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)
        rounds = [order for order in cluster.orders if order.follows]

    assert found == wanted
    assert (found.trace.moves, found.trace.hops) == (1, 0)
    assert {order.replica_id for order in rounds} == {"rep-1"}
    assert [order.epoch for order in rounds] == list(range(1, len(rounds) + 1))
    assert cluster.nodes["rep-0"].relay.session_count == 0


async def test_a_stream_moves_again_and_again(new_engine: NewEngine, text: ModelText, wanted: Answer) -> None:
    async with Cluster(new_engine, leave_at(5, 45)) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)

    assert found == wanted
    assert found.trace.moves == 2


async def test_a_destination_that_dies_in_a_round_leaves_the_source_serving(
    new_engine: NewEngine, text: ModelText, wanted: Answer
) -> None:
    leave, killed = leave_at(10), []

    def happening(cluster: Cluster, node: Node, order: GenerateRequest, event: Event) -> None:
        leave(cluster, node, order, event)
        if order.follows and order.epoch == 1 and not killed:
            killed.append(order.replica_id)
            node.kill()

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)

    assert found == wanted
    assert killed == ["rep-1"]
    assert found.trace.hops == found.trace.replica_ids.count("rep-1")


async def test_a_source_that_dies_during_its_move_is_a_crash_like_any_other(
    new_engine: NewEngine, text: ModelText, wanted: Answer
) -> None:
    leave = leave_at(10)

    def happening(cluster: Cluster, node: Node, order: GenerateRequest, event: Event) -> None:
        leave(cluster, node, order, event)
        if order.follows and order.epoch == 1:
            cluster.nodes["rep-0"].kill()

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)

    assert found == wanted
    assert found.trace.hops + found.trace.moves == 1


async def test_a_destination_that_dies_right_after_the_switch_is_a_crash_like_any_other(
    new_engine: NewEngine, text: ModelText, wanted: Answer
) -> None:
    leave, seen = leave_at(10), []

    def happening(cluster: Cluster, node: Node, order: GenerateRequest, event: Event) -> None:
        leave(cluster, node, order, event)
        is_owner = order.follows and cluster.nodes["rep-0"].relay.session_count == 0
        if is_owner and not seen:
            seen.append(event.position)
            node.kill()

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)

    assert found == wanted
    assert seen
    assert found.trace.hops == 1


async def test_source_and_destination_that_die_together_change_nothing(
    new_engine: NewEngine, text: ModelText, wanted: Answer
) -> None:
    leave = leave_at(10)

    def happening(cluster: Cluster, node: Node, order: GenerateRequest, event: Event) -> None:
        leave(cluster, node, order, event)
        if order.follows and order.epoch == 1:
            cluster.nodes["rep-0"].kill()
            node.kill()

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)

    assert found == wanted
    assert found.trace.hops == 1


async def test_a_zombie_owner_is_refused_by_the_node_that_knows_a_later_one(new_engine: NewEngine) -> None:
    async with Cluster(new_engine, lambda *_: None) as cluster:
        cluster.nodes["rep-0"] = node = Node(new_engine())
        cluster._stack.push_async_callback(node.close)
        node.fence.admit("ses-1", 5, follows=False)
        late = GenerateRequest(session_id="ses-1", epoch=4, prompt_token_ids=[1])

        with pytest.raises(Fenced, match="epoch 5"):
            await anext(cluster.generate(replica("rep-0"), late, timeout_seconds=1))

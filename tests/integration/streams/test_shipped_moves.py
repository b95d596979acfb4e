"""Moves whose keys and values are shipped: the client sees the same bits, wherever the shipment breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from services.gateway.sessions.hops import HopPolicy
from services.gateway.text.model_text import ModelText
from services.worker.engine.protocol import Sampling, Submit
from stoker.errors import KvUnavailable, WorkerDied
from stoker.ids import SessionId
from stoker.v1.session_kv_pb2 import KvPart
from stoker.v1.session_pb2 import GenerateRequest
from tests.integration.streams.cluster import Cluster, Event, Node
from tests.integration.streams.engines import NewEngine, Replicas, answer
from tests.integration.streams.test_oracle import GREEDY, PROMPT, SAMPLED
from tests.unit.services.worker.kv.test_kv_exchange import shipped, stopped_after
from tests.unit.services.worker.tiny_models import numbers, run

POSITIONS = 64
ALL_SHIPPED = HopPolicy(max_hops=1000, long_session_tokens=0)


def how(sampling: dict, tokens: int = POSITIONS + 8) -> dict:
    return sampling | {"max_tokens": tokens, "top_logprobs": 3, "ignore_eos": True}


def leave_after(positions: list[int]) -> Callable[..., None]:
    """Ask the owner to let the session go after each of these tokens, or as soon after as it can."""

    def happening(cluster: Cluster, node: Node, order: object, event: Event) -> None:
        if positions and event.tokens and event.position >= positions[0]:
            positions.pop(0)
            node.ask_to_leave()

    return happening


async def until_nothing_is_held(cluster: Cluster) -> None:
    """Wait until every node that lives has its whole cache free again."""
    async with asyncio.timeout(60):
        alive = [node for node in cluster.nodes.values() if not node.is_dead]
        while any(node.kv_tokens for node in alive):  # noqa: ASYNC110 - engine threads set no event
            await asyncio.sleep(0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("position", [0, 30])
async def test_a_move_with_shipped_keys_and_values_changes_nothing(
    new_engine: NewEngine, text: ModelText, sampling: dict, position: int
) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(sampling))

    async with Cluster(new_engine, leave_after([position])) as cluster:
        found = await answer(cluster, text, PROMPT, **how(sampling))
        tokens = [shipped.tokens for shipped in cluster.shipped]
        holds = len(cluster.holds)

    assert found == wanted
    assert holds == 1
    assert (found.trace.moves, found.trace.hops) == (1, 0)
    assert tokens == sorted(tokens)
    assert tokens[0] >= len(PROMPT)
    assert cluster.nodes["rep-1"].prefilled_tokens == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_hop_after_each_of_the_first_tokens_changes_nothing(each_engine: NewEngine, sampling: dict) -> None:
    """Beside others: `test_oracle_of_mixed_batches`."""
    new_engine = each_engine
    wanted = Submit(
        session_id=SessionId("s"),
        prompt_token_ids=PROMPT,
        sampling=Sampling(**({"seed": 11} | how(sampling, POSITIONS + 2))),
    )
    whole = numbers(run(new_engine(), [wanted])[0]["s"])
    source = new_engine()
    made = stopped_after(source, wanted, 1)

    while len(made) < POSITIONS:
        destination, generated = new_engine(), [out.token_id for out in made]
        staged = shipped(source.export_kv(SessionId("s")), destination)
        source.close()
        source = destination
        resumed = replace(wanted, generated_token_ids=generated, staged=staged)
        made += stopped_after(source, resumed, 1)
        assert source.stats().replay_token_count == 0
    source.close()

    assert numbers(made) == whole[: len(made)]


async def test_a_long_session_lacks_one_token_when_it_comes(new_engine: NewEngine, text: ModelText) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))

    async with Cluster(new_engine, leave_after([30])) as cluster:
        found = await answer(cluster, text, PROMPT, policy=ALL_SHIPPED, **how(SAMPLED))
        last, order = cluster.shipped[-1], cluster.orders[-1]
        holds = cluster.holds
        computed = cluster.nodes["rep-1"].prefilled_tokens, cluster.nodes["rep-1"].replayed_tokens
        await until_nothing_is_held(cluster)

    assert found == wanted
    assert (found.trace.moves, found.trace.hops, holds) == (1, 0, [])
    assert last.held_tokens == last.tokens + 1 == len(PROMPT) + len(order.generated_token_ids)
    assert computed == (0, 0)


async def test_a_long_session_whose_last_tokens_are_not_shipped_goes_on(
    new_engine: NewEngine, text: ModelText
) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))
    broken: list[KvPart] = []

    def on_part(cluster: Cluster, came: KvPart) -> None:
        if came.header.held_tokens and not broken:
            broken.append(came)
            raise KvUnavailable("no")

    async with Cluster(new_engine, leave_after([5]), on_part) as cluster:
        found = await answer(cluster, text, PROMPT, policy=ALL_SHIPPED, **how(SAMPLED))
        holds = cluster.holds
        await until_nothing_is_held(cluster)

    assert found == wanted
    assert broken
    assert holds[0] == 0.0
    assert (found.trace.moves, found.trace.hops) == (1, 0)


async def test_a_source_that_stood_still_for_a_destination_that_died_goes_on(
    new_engine: NewEngine, text: ModelText
) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))
    leave = leave_after([5])

    def happening(cluster: Cluster, node: Node, order: GenerateRequest, event: Event) -> None:
        leave(cluster, node, order, event)
        if order.follows and node is cluster.nodes["rep-1"] and not node.is_dead:
            node.kill()
            raise WorkerDied("killed")

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **how(SAMPLED))
        holds = cluster.holds[:2]
        await until_nothing_is_held(cluster)

    assert found == wanted
    assert holds[0] > 0.0
    assert holds[1] == 0.0
    assert (found.trace.moves, found.trace.hops) == (1, 0)


async def test_many_moves_of_one_stream_change_nothing(new_engine: NewEngine, text: ModelText) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))

    async with Cluster(new_engine, leave_after(list(range(0, POSITIONS, 16)))) as cluster:
        found = await answer(cluster, text, PROMPT, **how(SAMPLED))
        await until_nothing_is_held(cluster)

    assert found == wanted
    assert found.trace.moves >= 2


@pytest.mark.parametrize(
    ("fault", "part"),
    [("refused", 0), ("damaged", 0), ("damaged", 1), ("source dies", 1), ("destination dies", 1)],
)
async def test_wherever_a_shipment_breaks_the_stream_goes_on(
    new_engine: NewEngine, text: ModelText, fault: str, part: int
) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))
    seen: list[KvPart] = []

    def on_part(cluster: Cluster, came: KvPart) -> None:
        seen.append(came)
        if len(seen) != part + 1:
            return
        if fault == "refused":
            raise KvUnavailable("no")
        if fault == "damaged":
            came.ClearField("header" if part == 0 else "piece")
        else:
            cluster.nodes["rep-0" if fault == "source dies" else "rep-1"].kill()

    async with Cluster(new_engine, leave_after([5]), on_part) as cluster:
        found = await answer(cluster, text, PROMPT, **how(SAMPLED))
        await until_nothing_is_held(cluster)

    assert found == wanted
    assert len(seen) > part
    assert found.trace.moves + found.trace.hops == 1


@pytest.mark.parametrize(("to", "ends_at"), [("rep-7", "rep-7"), ("rep-unknown", "rep-0")])
async def test_a_session_that_is_sent_somewhere_goes_there_or_stays(
    new_engine: NewEngine, text: ModelText, to: str, ends_at: str
) -> None:
    wanted = await answer(Replicas(new_engine), text, PROMPT, **how(SAMPLED))
    told: list[str] = []

    def happening(cluster: Cluster, node: Node, order: object, event: Event) -> None:
        if event.tokens and not told:
            told.append(to)
            node.relay.ask_to_leave("an operator wants it", 0.0, to_replica_id=to)

    async with Cluster(new_engine, happening) as cluster:
        found = await answer(cluster, text, PROMPT, **how(SAMPLED))

    assert found == wanted
    assert found.trace.replica_ids[-1] == ends_at
    assert (found.trace.moves, found.trace.hops) == (int(to == ends_at), 0)

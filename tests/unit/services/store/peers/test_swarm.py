"""Stores that decide for themselves read the origin once, whatever the order of their messages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.store.peers.swarm import (
    DIRECT,
    FIRST_COPIES,
    MAX_REQUESTS_PER_PEER,
    PATIENCE_SECONDS,
    SETTLE_SECONDS,
    UNCLAIMED_PATIENCE_SECONDS,
    Choice,
    FileSwarm,
)
from tests.unit.services.store.peers.fleet import Fleet

NOW = 100.0


def swarm(chunks: int = 8, **peers: dict) -> FileSwarm:
    """A settled swarm of `me` with peers of these states."""
    made = FileSwarm(me="me", chunks=chunks, joined_seconds=NOW)
    for name, state in peers.items():
        made.update(name, **({"have": 0, "fetching": 0, "loading": True} | state))
    return made


def owned_by(owner: str, other: str) -> int:
    """A chunk that one of two stores owns."""
    return next(
        index
        for index in range(1000)
        if FileSwarm(me=other, chunks=1000, joined_seconds=0.0)._outranks(owner, index)
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stores=st.integers(1, 6),
    chunks=st.integers(1, 40),
    latest=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
)
def test_however_many_ask_the_origin_is_read_once(seed, stores, chunks, latest):
    fleet = Fleet(seed, chunks=chunks)
    for number in range(stores):
        fleet.at(fleet.random.uniform(0, latest), lambda number=number: fleet.join(f"s{number}"))
    fleet.run()

    assert not fleet.unfinished()
    assert fleet.origin == dict.fromkeys(range(chunks), 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stores=st.integers(2, 6),
    chunks=st.integers(1, 40),
    deaths=st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 6.0)), max_size=5),
)
def test_whoever_dies_the_others_get_every_chunk_and_only_the_lost_ones_again(seed, stores, chunks, deaths):
    fleet = Fleet(seed, chunks=chunks)
    for number in range(stores):
        fleet.at(fleet.random.uniform(0, 0.5), lambda number=number: fleet.join(f"s{number}"))
    for number, seconds in deaths:
        name = f"s{number % stores}"
        fleet.at(0.5 + seconds, lambda name=name: fleet.die(name))
    fleet.run()

    assert not fleet.unfinished()
    assert max(fleet.origin.values()) <= 1 + fleet.deaths


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), stores=st.integers(1, 5), chunks=st.integers(1, 40))
def test_a_store_that_has_everything_sends_one_copy_and_the_origin_is_left_alone(seed, stores, chunks):
    fleet = Fleet(seed, chunks=chunks)
    fleet.join("seed", complete=True)
    for number in range(stores):
        fleet.at(fleet.random.uniform(0, 0.1), lambda number=number: fleet.join(f"s{number}"))
    fleet.run()

    assert not fleet.unfinished()
    assert not fleet.origin
    assert sum(fleet.sent.values()) == stores * chunks


def test_the_seed_is_not_asked_for_a_chunk_twice_while_others_load_it():
    fleet = Fleet(7, chunks=64)
    fleet.join("seed", complete=True)
    for number in range(4):
        fleet.join(f"s{number}")
    fleet.run()

    assert fleet.sent["seed"] < 2 * 64  # the last to finish get late copies from whoever is free


def test_nothing_is_fetched_before_the_peers_have_answered():
    alone = FileSwarm(me="me", chunks=1, joined_seconds=NOW)
    alone.expect("a")

    assert alone.choose([0], NOW + SETTLE_SECONDS / 2) is None
    assert alone.choose([0], NOW + SETTLE_SECONDS) == Choice(
        index=0, peer=None, first_copy=True, claimed=True
    )


def test_a_chunk_that_a_rival_is_fetching_is_had_from_it_while_it_arrives():
    index = owned_by("me", "a")

    choice = swarm(1000, a={"fetching": 1 << index}).choose([index], NOW)
    assert choice == Choice(index=index, peer="a", first_copy=False)


def test_a_chunk_that_is_sent_on_goes_to_a_few_at_a_time():
    fleet = {f"s{number}": {} for number in range(3 * DIRECT)}
    chosen = 0
    for me in fleet:
        made = FileSwarm(me=me, chunks=1, joined_seconds=NOW)
        for name in fleet:
            if name != me:
                made.update(name, have=0, fetching=0, loading=True)
        made.update("owner", have=0, fetching=1, loading=True)
        chosen += made.choose([0], NOW) is not None

    assert chosen == DIRECT


def test_of_those_who_lack_what_one_loader_has_one_fetches_it_and_sends_it_on():
    first, second = sorted(["me", "a"], key=lambda name: owned_by(name, "me" if name == "a" else "a") == 0)
    made = {}
    for me, other in [(first, second), (second, first)]:
        made[me] = FileSwarm(me=me, chunks=1, joined_seconds=NOW)
        made[me]._fetch_seconds = 1.0
        made[me].update("b", have=1, fetching=0, loading=True)
        made[me].update(other, have=0, fetching=0, loading=True)
    choices = {me: each.choose([0], NOW) for me, each in made.items()}
    (asks,) = [choice for choice in choices.values() if choice is not None]

    assert asks == Choice(index=0, peer="b", first_copy=False, claimed=True)


def test_a_chunk_that_a_rival_owns_is_left_to_it():
    index = owned_by("a", "me")

    assert swarm(1000, a={}).choose([index], NOW) is None


def test_a_rival_that_does_nothing_loses_what_it_has_not_claimed():
    index = owned_by("a", "me")
    made = swarm(1000, a={})
    late = NOW + UNCLAIMED_PATIENCE_SECONDS + 0.1
    assert made.choose([index], NOW) is None

    assert made.choose([index], late) == Choice(index=index, peer=None, first_copy=True, claimed=True)


def test_a_rival_is_given_time_from_when_it_is_waited_for_and_not_from_when_it_joined():
    index = owned_by("a", "me")

    assert swarm(1000, a={}).choose([index], NOW + 1000) is None


def test_a_rival_that_moves_again_is_waited_for_again():
    index = owned_by("a", "me")
    made = swarm(1000, a={})
    made.choose([index], NOW)
    late = NOW + UNCLAIMED_PATIENCE_SECONDS + 0.1
    made.update("a", have=1 << 999, fetching=0, loading=True)

    assert made.choose([index], late) is None


def test_a_rival_that_gets_nowhere_loses_its_claim():
    index = owned_by("a", "me")
    made = swarm(1000, a={"fetching": 1 << 999})  # it is busy with another one
    assert made.choose([index], NOW) is None

    assert made.choose([index], NOW + PATIENCE_SECONDS - 0.1) is None
    assert made.choose([index], NOW + PATIENCE_SECONDS + 0.1) == Choice(
        index=index, peer=None, first_copy=True, claimed=True
    )


def test_an_origin_that_is_slow_for_me_may_be_slow_for_others():
    made = swarm(1000, a={"fetching": 1 << 999})
    theirs = owned_by("a", "me")
    assert made.choose([owned_by("me", "a")], NOW) is not None
    assert made.choose([theirs], NOW) is None

    assert made.choose([theirs], NOW + 2 * PATIENCE_SECONDS) is None


def test_a_rival_is_believed_while_bytes_come_from_it():
    theirs = owned_by("a", "me")
    made = swarm(1000, a={"have": 1 << 999})
    assert made.choose([999], NOW) == Choice(index=999, peer="a", first_copy=False)

    assert made.choose([theirs], NOW + 100 * PATIENCE_SECONDS) is None


def test_a_chunk_that_a_peer_refuses_is_not_asked_of_it_again():
    index = owned_by("me", "a")
    made = swarm(1000, a={"have": 1 << index})
    made.choose([index], NOW)
    made.release(index, NOW, done=False)
    made.refused("a", index)

    assert made.choose([index], NOW).peer is None


def test_chunks_that_are_read_together_are_owned_by_one_store():
    made = FileSwarm(me="me", chunks=64, joined_seconds=NOW, run_chunks=4)
    made.update("a", have=0, fetching=0, loading=True)

    mine = [made._outranks("a", index) for index in range(64)]
    assert all(len(set(mine[at : at + 4])) == 1 for at in range(0, 64, 4))


def test_a_run_that_is_half_read_does_not_wait_for_itself():
    made = swarm(1000, a={}, b={}, c={}, d={})
    mine = [index for index in range(1000) if not any(made._outranks(peer, index) for peer in "abcd")]
    for index in mine[:20]:  # none of them has arrived: they are checked together at the end
        assert made.choose([index], NOW) is not None
        made.release(index, NOW, done=True)


def test_first_copies_at_a_time_are_few_when_others_wait_for_them():
    alone, among = FileSwarm(me="me", chunks=64, joined_seconds=NOW), swarm(64, a={}, b={}, c={})
    for each in (alone, among):
        while each.choose(range(64), NOW):
            pass

    assert alone.fetching.bit_count() == 64
    assert among.fetching.bit_count() == FIRST_COPIES


def test_what_a_rival_has_is_had_from_it():
    assert swarm(a={"have": 1}).choose([0], NOW) == Choice(index=0, peer="a", first_copy=False)


def test_the_rarest_of_equally_early_chunks_goes_first():
    made = swarm(a={"have": 0b11}, b={"have": 0b01})

    assert made.choose([0, 1], NOW).index == 1


def test_an_early_chunk_goes_before_a_rarer_late_one():
    early, late = list(range(8)), 8
    made = swarm(9, a={"have": (1 << 9) - 1}, b={"have": (1 << 8) - 1})

    assert made.choose([*early, late], NOW).index != late


def test_the_least_busy_holder_is_asked():
    made = swarm(a={"have": 0xFF}, b={"have": 0xFF})

    asked = [made.choose([index], NOW).peer for index in range(4)]
    assert sorted(asked) == ["a", "a", "b", "b"]


def test_requests_to_one_peer_are_bounded():
    made = swarm(16, a={"have": 0xFFFF})
    for index in range(MAX_REQUESTS_PER_PEER):
        assert made.choose([index], NOW) is not None

    assert made.choose([10], NOW) is None
    made.release(0, NOW, done=True)
    assert made.choose([10], NOW) is not None


def test_a_dropped_peer_is_neither_asked_nor_waited_for():
    made = swarm(a={"have": 0b01, "fetching": 0b10})
    made.drop("a", until_seconds=NOW + 5)

    assert made.choose([0], NOW) == Choice(index=0, peer=None, first_copy=True, claimed=True)
    assert made.choose([1], NOW) == Choice(index=1, peer=None, first_copy=True, claimed=True)


def test_a_failed_fetch_gives_its_claim_up_and_a_done_one_keeps_it_until_the_chunk_is_there():
    made = swarm()
    made.choose([0], NOW)
    made.choose([1], NOW)
    made.release(0, NOW, done=False)
    made.release(1, NOW, done=True)

    assert made.fetching == 0b10
    made.arrived(1)
    assert (made.fetching, made.have) == (0, 0b10)

"""What is shared, by whom, and when memory may be used for something else."""

from __future__ import annotations

from pathlib import Path

from services.store.peers.exchange import Exchange, raw_digest
from services.store.peers.shared_file import DiskCopy, Loader
from services.store.peers.wire import FileIdentity, State, StoreId

FILE = FileIdentity(revision="r1", name="model.safetensors", size_bytes=100, chunk_bytes=32)
PEER = StoreId("peer")


def exchange(copy: DiskCopy | None = None) -> Exchange:
    """An exchange whose disk holds this copy of every file."""
    return Exchange(StoreId("me"), find_on_disk=lambda _: copy, now=lambda: 100.0)


def state(**fields) -> State:
    """What a peer says of the file."""
    said = {"file_id": FILE.file_id, "loading": True, "chunks": 4, "have": 0, "fetching": 0}
    return State(**(said | fields))


def put(made: Exchange, index: int, holder: int = 1, content: bytes = b"\1" * 32) -> None:
    """Share a chunk of the file."""
    made.put(FILE, holder, index, memoryview(bytearray(content)))


def test_a_chunk_that_arrived_can_be_borrowed_and_others_can_not():
    made = exchange()
    put(made, 3, content=b"\7" * 32)

    with made.borrow(FILE.file_id, 3) as chunk:
        assert bytes(chunk.memory) == b"\7" * 4  # the file ends there
        assert (chunk.offset, chunk.length) == (96, 4)
    with made.borrow(FILE.file_id, 0) as chunk:
        assert chunk is None


def test_memory_is_given_back_at_once_when_nothing_of_it_is_being_sent():
    made = exchange()
    put(made, 0)

    assert made.withdraw(FILE.file_id, 1, lambda: None) is True
    assert made.state(FILE.file_id) is None


def test_memory_that_is_being_sent_stays_until_the_last_borrower_is_done():
    made, called = exchange(), []
    put(made, 0)
    put(made, 1)

    with made.borrow(FILE.file_id, 0), made.borrow(FILE.file_id, 1):
        assert made.withdraw(FILE.file_id, 1, lambda: called.append("idle")) is False
        with made.borrow(FILE.file_id, 1) as late:
            assert late is None
        assert not called
    assert called == ["idle"]


def test_of_two_holders_of_one_file_the_first_shares():
    made = exchange()
    put(made, 0, holder=1)
    put(made, 1, holder=2)

    assert made.state(FILE.file_id).have == 0b1
    assert made.withdraw(FILE.file_id, 2, lambda: None) is True
    assert made.state(FILE.file_id).have == 0b1


def test_one_load_of_a_file_at_a_time_joins():
    made = exchange()

    assert made.join(FILE) is not None
    assert made.join(FILE) is None


def test_a_load_that_ended_leaves_its_chunks_shared():
    made = exchange()
    made.join(FILE)
    put(made, 2)
    made.leave(FILE.file_id)

    assert made.state(FILE.file_id) == state(loading=False, have=0b100)


def test_who_asks_before_the_load_begins_is_a_rival_from_its_start():
    made = exchange()
    made.subscribe(PEER, FILE, loading=True)
    swarm = made.join(FILE)

    assert swarm.peers[PEER].interested


def test_a_load_waits_for_the_peers_that_are_linked():
    made = exchange()
    made.linked(PEER)
    swarm = made.join(FILE)

    assert not swarm.settled(100.0)
    made.update(PEER, state())
    assert swarm.settled(100.0)


def test_what_a_peer_had_counts_until_its_last_link_breaks():
    made = exchange()
    made.linked(PEER)
    made.linked(PEER)
    swarm = made.join(FILE)
    made.update(PEER, state(have=0b1))

    made.unlinked(PEER)
    assert swarm.peers[PEER].have == 0b1
    made.unlinked(PEER)
    assert PEER not in swarm.peers


def test_a_state_of_another_number_of_chunks_is_passed_over():
    made = exchange()
    swarm = made.join(FILE)
    made.update(PEER, state(chunks=5, have=0b11111))

    assert not swarm.peers


def test_listeners_hear_of_chunks_that_arrive():
    made, heard = exchange(), []
    made.listen(heard.append)
    put(made, 0)

    assert heard == [FILE.file_id]


def test_a_file_on_disk_is_offered_to_those_who_ask():
    copy = DiskCopy(locate=lambda: Path("/models/a/model.safetensors"), have=0b0101)
    made = exchange(copy)

    assert made.subscribe(PEER, FILE, loading=True) == state(loading=False, have=0b0101)
    with made.borrow(FILE.file_id, 2) as chunk:
        assert (chunk.copy, chunk.memory, chunk.offset, chunk.length) == (copy, None, 64, 32)
    with made.borrow(FILE.file_id, 1) as chunk:
        assert chunk is None


def test_a_load_takes_over_from_one_that_gives_way_and_goes_on_with_what_it_began():
    made = exchange()
    pull, load = Loader(gives_way=True), Loader()
    begun = made.join(FILE, loader=pull)
    taken_over = made.join(FILE, loader=load)
    made.leave(FILE.file_id, pull)

    assert taken_over is begun
    assert pull.over.is_set()
    assert made.state(FILE.file_id).loading
    assert made.join(FILE, loader=Loader(gives_way=True)) is None
    made.leave(FILE.file_id, load)
    assert made.state(FILE.file_id) is None


def test_what_landed_on_disk_alone_is_offered_and_whoever_gets_it_as_it_comes_is_told_it_is_whole():
    made = exchange()
    made.subscribe(PEER, FILE, loading=False)
    made.join(FILE, loader=Loader(gives_way=True))
    arriving = made.begin(FILE.file_id, 2, memoryview(bytearray(32)))
    made.landed(FILE, 0b0101, lambda: Path("/cache/model.safetensors"))

    assert arriving.after(0, seconds=0.0) == (32, True)
    assert made.state(FILE.file_id) == state(loading=True, have=0b0101)
    with made.borrow(FILE.file_id, 2) as chunk:
        assert chunk.copy.locate() == Path("/cache/model.safetensors")
    made.leave(FILE.file_id)
    assert made.state(FILE.file_id) == state(loading=False, have=0b0101)


def test_what_landed_of_a_file_that_nobody_loads_is_not_kept_in_mind():
    made = exchange()
    made.landed(FILE, 0b1, lambda: Path("/cache/model.safetensors"))

    assert made.state(FILE.file_id) is None


def test_a_file_nobody_cares_for_is_forgotten():
    made = exchange()
    made.subscribe(PEER, FILE, loading=True)
    made.unsubscribe(PEER, FILE.file_id)

    assert made.state(FILE.file_id) is None


def test_a_digest_is_that_of_the_bytes():
    made = exchange()
    put(made, 0, content=b"\5" * 32)

    with made.borrow(FILE.file_id, 0) as chunk:
        assert made.digest_of(FILE.file_id, 0, chunk.memory) == raw_digest(b"\5" * 32)

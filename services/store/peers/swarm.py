"""Which chunk comes from where: each store decides for itself, and no two fetch the same one. Pure.

Theory of operation. Stores that load a file are *rivals*; stores that merely have it are *seeds*. The first
copy of a chunk (from a seed where there is one, else from the origin) is fetched by its *owner*: the rival
that ranks first for this chunk by rendezvous hashing. Ranks compare two stores without regard to others, so
two stores that know of each other never both own a chunk, whatever else each of them knows. A store begins
only when everyone it can reach has told what it has and is fetching (`settled`), and who answers takes the
newcomer into account from then on. Everyone else gets the chunk from whichever rival has it.

1. Somebody who is loading has it: as many rivals as have it ask, in the order of their ranks, each the least
   busy one; the chunks that fewest have go first. The others do as in 2.
2. A rival is fetching it: ask it now, the bytes are sent on as they arrive there. So N stores that each fetch
   their share of the origin and send it on all have the file when the origin has sent it once, and whoever
   has much of it sends it once too.
3. I own it: first copy, from the least busy seed, else from the origin.
4. A rival owns it: wait.

What is sent on while it arrives (2) goes to `DIRECT` rivals, so that in a large fleet a chunk spreads as a
tree. Nobody waits long for a rival that could ask and wants other chunks.

A rival that gets nowhere while others wait for it loses its shares and, later, its claims (4, 2) in their
eyes, until it moves again; so does one that is gone. One from which bytes come, or that has claimed other
chunks, is busy: its shares are left to it. One that lies or is too slow is let go (`drop`).

Order: a prefix of the file is worth more than its rest (execution starts on it), so chunks count in blocks of
`BLOCK_CHUNKS`: own shares go first until `FIRST_COPIES` are under way, then the rarest of the first block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import xxhash

from services.store.peers.wire import StoreId

BLOCK_CHUNKS = 8
"""Chunks that count as equally early."""

WINDOW_CHUNKS = 64
"""How far ahead a store looks for something to do."""

FIRST_COPIES = 2
"""First copies under way before anything else is fetched."""

ALL_FIRST_COPIES = 8
"""First copies under way in all rivals together, at most, but `FIRST_COPIES` each. Many at a time share one
link and all end late: until then nobody has anything to hand on. A store that has peers begins with
`FIRST_COPIES` and takes one more whenever one is done: the others are finding out what to load over the same
link."""

DIRECT = 3
"""Rivals that get a chunk from a store that is fetching it: its link is shared among them. Simulated with
links of one rate, 8 stores take 1.5 times one copy's time; with 8 here 2.1 times: shares are not equal."""

MAX_REQUESTS_PER_PEER = 4
SETTLE_SECONDS = 1.0
"""Longest wait for the answers of peers before the first chunk is fetched."""

MAX_SPREAD_SECONDS = 2.0
"""Longest wait for rivals that rank before this store to get a chunk from the few who have it."""

PATIENCE_SECONDS = 10.0
"""A chunk that a rival claims may take this long, or four times what first copies take here."""

UNCLAIMED_PATIENCE_SECONDS = 2.0
"""A rival that claims nothing and gets nothing for so long loses its shares to those who wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to fetch now.

    Attributes:
        index: Which chunk.
        peer: From whom; None = from the origin.
        first_copy: No rival has it yet.
        claimed: Rivals lack it, too: they are told of this fetch, and its bytes are sent on.
    """

    index: int
    peer: StoreId | None
    first_copy: bool
    claimed: bool = False


@dataclass(slots=True, kw_only=True)
class PeerView:
    """What is known of a peer, for one file.

    Attributes:
        have: Bits of the chunks it has.
        fetching: Bits of the chunks it has claimed.
        loading: It is loading, as it says.
        interested: It asked what this store has, because it is loading.
        answered: It has told its state.
        waited_since_seconds: When this store began to wait for it, since its last news; None = it doesn't.
        unusable_until_seconds: Not asked, waited for or reckoned with before.
        in_flight: Requests of this store to it.
    """

    have: int = 0
    fetching: int = 0
    loading: bool = False
    interested: bool = False
    answered: bool = False
    waited_since_seconds: float | None = None
    unusable_until_seconds: float = float("-inf")
    in_flight: int = 0


@dataclass(slots=True, kw_only=True)
class _Taken:
    choice: Choice
    since_seconds: float
    done: bool = False


@dataclass(slots=True, kw_only=True)
class FileSwarm:
    """One file that this store is loading, and what its peers have of it. Not thread safe.

    Attributes:
        me: This store.
        chunks: How many the file has.
        joined_seconds: When the load began.
        run_chunks: Neighbouring chunks that are read, checked and handed on together, so owned by one store.
        have: Bits of the chunks that are here.
        peers: By store.
    """

    me: StoreId
    chunks: int
    joined_seconds: float
    run_chunks: int = 1
    have: int = 0
    peers: dict[StoreId, PeerView] = field(default_factory=dict)
    _taken: dict[int, _Taken] = field(default_factory=dict)
    _spreading: dict[int, float] = field(default_factory=dict)
    _first_copies_done: int = 0
    _first_copy_seconds: float = 0.0
    _fetch_seconds: float = 0.0

    # --- what is learnt ---

    def expect(self, peer: StoreId) -> None:
        """Reckon with an answer of a peer that is being asked."""
        self.peers.setdefault(peer, PeerView())

    def interested(self, peer: StoreId, *, loading: bool) -> None:
        """Take note that a peer asked what is here; a loading one is a rival from now on."""
        self.peers.setdefault(peer, PeerView()).interested = loading

    def update(self, peer: StoreId, *, have: int, fetching: int, loading: bool) -> None:
        """Take over what a peer says."""
        view = self.peers.setdefault(peer, PeerView())
        if (have, fetching, loading) != (view.have, view.fetching, view.loading):
            view.waited_since_seconds = None
        view.have, view.fetching, view.loading, view.answered = have, fetching, loading, True

    def gone(self, peer: StoreId) -> None:
        """Forget a peer: its link broke, or it left."""
        self.peers.pop(peer, None)

    def drop(self, peer: StoreId, *, until_seconds: float) -> None:
        """Do without a peer for a while."""
        if peer in self.peers:
            self.peers[peer].unusable_until_seconds = until_seconds

    def refused(self, peer: StoreId, index: int) -> None:
        """Note that a peer doesn't give a chunk that it had or was fetching; its next state says more."""
        view = self.peers.get(peer)
        if view is not None:
            view.have &= ~(1 << index)
            view.fetching &= ~(1 << index)

    def arrived(self, index: int) -> None:
        """Note that a chunk is here, checked."""
        self.have |= 1 << index
        self._taken.pop(index, None)
        self._spreading.pop(index, None)

    # --- what is decided ---

    @property
    def fetching(self) -> int:
        """Bits of the chunks claimed here: what others wait for, or have sent on to them."""
        return sum(1 << index for index, taken in self._taken.items() if taken.choice.claimed)

    def settled(self, now_seconds: float) -> bool:
        """Tell whether everyone who was asked has answered, or had the time to."""
        if now_seconds >= self.joined_seconds + SETTLE_SECONDS:
            return True
        return all(view.answered for view in self.peers.values())

    def choose(self, wanted: Iterable[int], now_seconds: float) -> Choice | None:
        """Take the chunk to fetch next out of those that are wanted; None = wait until something changes.

        Args:
            wanted: Chunks in the order in which they are needed.
            now_seconds: Monotonic.
        """
        if not self.settled(now_seconds):
            return None
        first: list[Choice] = []
        copies: list[tuple[int, int, Choice]] = []
        window = [index for index in islice(wanted, WINDOW_CHUNKS) if index not in self._taken]
        for place, index in enumerate(window):
            choice, holders = self._consider(index, now_seconds)
            if choice is None:
                continue
            if choice.first_copy:
                first.append(choice)
            else:
                copies.append((place // BLOCK_CHUNKS, holders, choice))
        running = sum(taken.choice.first_copy and not taken.done for taken in self._taken.values())
        rarest = min(copies, key=lambda each: (each[:2], each[2].index), default=None)
        if first and (running < FIRST_COPIES or (rarest is None and running < self._most_first_copies())):
            return self._take(first[0], now_seconds)
        return None if rarest is None else self._take(rarest[2], now_seconds)

    def release(self, index: int, now_seconds: float, *, done: bool) -> None:
        """Note that a fetch has ended; one that is done keeps its claim until `arrived`."""
        taken = self._taken.get(index)
        if taken is None:
            return
        if taken.done and done:
            return
        view = self.peers.get(taken.choice.peer or StoreId(""))
        if not taken.done and view is not None and view.in_flight:
            view.in_flight -= 1
        taken.done = done
        if done:
            seconds = now_seconds - taken.since_seconds
            self._fetch_seconds = _learnt(self._fetch_seconds, seconds)
            if taken.choice.first_copy:
                self._first_copies_done += 1
                self._first_copy_seconds = _learnt(self._first_copy_seconds, seconds)
        if not done:
            del self._taken[index]

    def take_from_origin(self, index: int, now_seconds: float) -> Choice:
        """Claim a chunk whatever the rules say: its peers failed, and it is needed."""
        return self._take(Choice(index=index, peer=None, first_copy=True, claimed=True), now_seconds)

    def _consider(self, index: int, now_seconds: float) -> tuple[Choice | None, int]:
        """Return how to get a chunk now, if it can be, and how many have it: rules 1 to 4."""
        bit = 1 << index
        usable = [
            (peer, view) for peer, view in self.peers.items() if now_seconds >= view.unusable_until_seconds
        ]
        holders = [(peer, view) for peer, view in usable if view.have & bit]
        rivals = [
            (peer, view) for peer, view in usable if (view.loading or view.interested) and not view.have & bit
        ]
        first_copy = not any(view.loading for _, view in holders)
        before = [each for each in rivals if self._outranks(each[0], index)]
        if first_copy or len(before) >= len(holders):
            for peer, view in rivals:
                if view.fetching & bit and self._waits_for(view, now_seconds):
                    return self._sent_on(index, peer, view, rivals), 1
        if first_copy:
            if any(self._waits_for(view, now_seconds) for _, view in before):
                return None, 0
            if not holders:
                return Choice(index=index, peer=None, first_copy=True, claimed=True), 0
        elif len(before) >= len(holders) and self._spreads(index, now_seconds):
            return None, 0
        free = [
            (not view.loading, view.in_flight // 2, self._only_there(peer), _rank(peer, index, self.me), peer)
            for peer, view in holders
            if view.in_flight < MAX_REQUESTS_PER_PEER
        ]
        if not free:
            return None, 0
        claimed = first_copy or bool(rivals)
        choice = Choice(index=index, peer=min(free)[4], first_copy=first_copy, claimed=claimed)
        return choice, len(holders)

    def _sent_on(
        self, index: int, claimer: StoreId, view: PeerView, rivals: list[tuple[StoreId, PeerView]]
    ) -> Choice | None:
        """Return how to get a chunk while a rival is fetching it, unless that one has enough to do."""
        before = sum(peer != claimer and self._outranks(peer, index) for peer, _ in rivals)
        if before >= DIRECT or view.in_flight >= MAX_REQUESTS_PER_PEER:
            return None
        return Choice(index=index, peer=claimer, first_copy=False)

    def _spreads(self, index: int, now_seconds: float) -> bool:
        """Tell whether to leave those who have a chunk to rivals that rank before this store, for a while."""
        since_seconds = self._spreading.setdefault(index, now_seconds)
        return now_seconds - since_seconds < min(MAX_SPREAD_SECONDS, 2 * self._fetch_seconds)

    def _only_there(self, peer: StoreId) -> int:
        """Return how many chunks nobody else has: who has many is asked last for the others."""
        others = self.have
        for other, view in self.peers.items():
            if other != peer:
                others |= view.have
        return (self.peers[peer].have & ~others).bit_count()

    def _most_first_copies(self) -> int:
        if not self.peers:
            return self.chunks
        rivals = sum(view.loading or view.interested for view in self.peers.values())
        fair = ALL_FIRST_COPIES // (1 + rivals)
        return max(FIRST_COPIES, min(fair, FIRST_COPIES + self._first_copies_done))

    def _outranks(self, peer: StoreId, index: int) -> bool:
        run = index // self.run_chunks
        return (_rank(peer, run), peer) > (_rank(self.me, run), self.me)

    def _waits_for(self, view: PeerView, now_seconds: float) -> bool:
        """Tell whether there is patience left with a rival that claims a chunk, or owns it."""
        if view.in_flight:  # what comes from it has deadlines of its own
            view.waited_since_seconds = None
            return True
        if view.waited_since_seconds is None:
            view.waited_since_seconds = now_seconds
        if view.fetching:  # an origin that is slow for me may be slow for it
            oldest = min((taken.since_seconds for taken in self._taken.values()), default=now_seconds)
            patience = max(PATIENCE_SECONDS, 4 * self._first_copy_seconds, 2 * (now_seconds - oldest))
        else:
            patience = max(UNCLAIMED_PATIENCE_SECONDS, 2 * self._first_copy_seconds)
        return now_seconds - view.waited_since_seconds <= patience

    def _take(self, choice: Choice, now_seconds: float) -> Choice:
        self._taken[choice.index] = _Taken(choice=choice, since_seconds=now_seconds)
        if choice.peer is not None:
            self.peers[choice.peer].in_flight += 1
        return choice


def _learnt(before: float, latest: float) -> float:
    return 0.75 * before + 0.25 * latest if before else latest


def _rank(store: StoreId, index: int, salt: str = "") -> int:
    """Return a number that looks random and is the same everywhere."""
    return int(xxhash.xxh3_64_intdigest(f"{store}/{salt}/{index}".encode()))

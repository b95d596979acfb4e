"""What this store shares with its peers, and what it knows of theirs: the state that all threads meet in.

Three kinds of callers: the event loop (links, the loads that begin and end), reader threads (which fetch) and
sending threads (which borrow chunks). One lock guards everything; nobody blocks while holding it. Whoever
waits for a peer waits on `changed`; links are told of changes by `listen`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.store.peers.arriving import Arriving
from services.store.peers.shared_file import Borrowed, DiskCopy, Loader, SharedFile
from services.store.peers.swarm import FileSwarm
from services.store.peers.wire import FileId, FileIdentity, State, StoreId
from stoker.checkpoint.digests import digest

_BEGIN_SECONDS = 1.0
"""Longest wait for the fetch of a claimed chunk to begin."""

MAX_FILES = 4096
"""Files shared or asked for at a time."""


FindOnDisk = Callable[[FileIdentity], DiskCopy | None]
"""Looks a file up in memory; called on the event loop, so it must not touch the disk."""


class Exchange:
    """The files shared between stores; used from any thread."""

    def __init__(
        self, me: StoreId, *, find_on_disk: FindOnDisk, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: me: this store. find_on_disk: for files that are not in the pool. now: monotonic seconds."""
        self.me = me
        self.now = now
        self.changed = threading.Condition()
        self._find_on_disk = find_on_disk
        self._files: dict[FileId, SharedFile] = {}
        self._linked: dict[StoreId, int] = {}
        self._listeners: list[Callable[[FileId], None]] = []
        self.closed = False
        """Nothing is waited for any more."""

    def close(self) -> None:
        """Let go who waits for peers."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def listen(self, listener: Callable[[FileId], None]) -> None:
        """Have `listener` called, from any thread, when what is told of a file has changed."""
        self._listeners.append(listener)

    # --- this store's own loads ---

    def join(
        self, identity: FileIdentity, *, run_chunks: int = 1, loader: Loader | None = None
    ) -> FileSwarm | None:
        """Begin to load a file together with others; None when another load has it, or too many do.

        Args:
            identity: Which.
            run_chunks: Chunks that are read together; the same in every store.
            loader: Who begins; it goes on with what one that gives way has begun.
        """
        loader = loader or Loader()
        with self.changed:
            file = self._file(identity)
            if file is None or file.holder is not None:
                return None
            if file.swarm is not None:
                if file.loader is None or not file.loader.gives_way or loader.gives_way:
                    return None
                file.loader.over.set()
                file.loader = loader
                self.changed.notify_all()
                return file.swarm
            file.loader = loader
            now_seconds = self.now()
            file.swarm = swarm = FileSwarm(
                me=self.me, chunks=identity.chunks, joined_seconds=now_seconds, run_chunks=run_chunks
            )
            for peer in self._linked:
                swarm.expect(peer)
            for peer in file.loading_peers:
                swarm.interested(peer, loading=True)
        self._tell(identity.file_id)
        return swarm

    def leave(self, file_id: FileId, loader: Loader | None = None) -> None:
        """End a load, however it ended; chunks that arrived stay shared until `withdraw`.

        Args:
            file_id: Of which file.
            loader: Whose; one that has given way ends nothing. None = whoever has it.
        """
        with self.changed:
            file = self._files.get(file_id)
            if file is None or file.swarm is None or loader not in {None, file.loader}:
                return
            file.swarm = file.loader = None
            file.end_arriving()
            self._forget_unneeded(file)
            self.changed.notify_all()
        self._tell(file_id)

    def begin(self, file_id: FileId, index: int, memory: memoryview) -> Arriving | None:
        """Have a chunk sent on while its first copy comes in; None when the load has ended.

        Args:
            file_id: Of which file.
            index: Which chunk.
            memory: Where it goes; stays the load's until a `withdraw` after the fetch has ended says yes.
        """
        with self.changed:
            file = self._files.get(file_id)
            if file is None or file.swarm is None:
                return None
            before = file.arriving.pop(index, None)
            if before is not None:
                before.end(whole=False)
            file.arriving[index] = arriving = Arriving(memory[: file.identity.length(index)])
            self.changed.notify_all()
            return arriving

    def put(self, identity: FileIdentity, holder: int, index: int, memory: memoryview) -> None:
        """Share a chunk that has arrived in the pool, checked.

        Args:
            identity: Of its file.
            holder: Whose chunk it is; of several holders of one file the first shares.
            index: Which chunk.
            memory: Its bytes, which stay as they are until `withdraw` has said yes.
        """
        with self.changed:
            file = self._file(identity)
            if file is None or file.holder not in {None, holder}:
                return
            file.holder = holder
            file.memory[index] = memory[: identity.length(index)]
            if (arriving := file.arriving.pop(index, None)) is not None:
                arriving.end(whole=True)
            if file.swarm is not None:
                file.swarm.arrived(index)
                self.changed.notify_all()
        self._tell(identity.file_id)

    def landed(self, identity: FileIdentity, bits: int, locate: Callable[[], Path]) -> None:
        """Share chunks that have arrived, checked, on this host's disk and not in the pool.

        Args:
            identity: Of their file; only one that is being loaded is shared so.
            bits: Which chunks.
            locate: Tells where the file lies now.
        """
        with self.changed:
            file = self._files.get(identity.file_id)
            if file is None or file.swarm is None:
                return
            before = 0 if file.copy is None else file.copy.have
            file.copy = DiskCopy(locate=locate, have=before | bits)
            for index in range(identity.chunks):
                if bits >> index & 1:
                    if (arriving := file.arriving.pop(index, None)) is not None:
                        arriving.end(whole=True)
                    file.swarm.arrived(index)
            self.changed.notify_all()
        self._tell(identity.file_id)

    def withdraw(self, file_id: FileId, holder: int, idle: Callable[[], None]) -> bool:
        """Share a holder's chunks no more; True when nothing of them is being sent.

        Args:
            file_id: Which file.
            holder: Whose.
            idle: Called once, from any thread, when the last chunk was sent, if some are being sent now.
        """
        with self.changed:
            file = self._files.get(file_id)
            if file is None or file.holder not in {None, holder}:
                return True
            file.memory.clear()
            file.digests.clear()
            for at, arriving in list(file.arriving.items()):
                if arriving.ended:  # and never put: its load failed
                    del file.arriving[at]
            if file.borrowed:
                file.idle.append(idle)
            else:
                file.holder = None
            is_idle = not file.borrowed
            self._forget_unneeded(file)
        self._tell(file_id)
        return is_idle

    # --- what peers say and ask ---

    def linked(self, peer: StoreId) -> None:
        """A peer can be asked from now on."""
        with self.changed:
            self._linked[peer] = self._linked.get(peer, 0) + 1
            for file in self._files.values():
                if file.swarm is not None:
                    file.swarm.expect(peer)

    def unlinked(self, peer: StoreId) -> None:
        """A peer can't be asked any more: what it had and claimed counts no longer."""
        with self.changed:
            self._linked[peer] -= 1
            if self._linked[peer]:
                return
            del self._linked[peer]
            for file in self._files.values():
                if file.swarm is not None:
                    file.swarm.gone(peer)
                    if peer in file.loading_peers:  # it still asks here
                        file.swarm.interested(peer, loading=True)
            self.changed.notify_all()

    def loading(self) -> list[FileIdentity]:
        """Return the files that this store is loading."""
        with self.changed:
            return [file.identity for file in self._files.values() if file.swarm is not None]

    def update(self, peer: StoreId, state: State) -> None:
        """Take over what a peer has of a file."""
        with self.changed:
            file = self._files.get(state.file_id)
            if file is None or file.swarm is None or state.chunks != file.identity.chunks:
                return
            file.swarm.update(peer, have=state.have, fetching=state.fetching, loading=state.loading)
            self.changed.notify_all()

    def subscribe(self, peer: StoreId, identity: FileIdentity, *, loading: bool) -> State | None:
        """Note that a peer wants to be told of a file; returns its state now, None when that is too much."""
        with self.changed:
            file = self._file(identity)
            if file is None:
                return None
            if file.holder is None and file.swarm is None:
                file.copy = self._find_on_disk(identity)
            file.subscribers += 1
            if loading:
                file.loading_peers.add(peer)
            if file.swarm is not None:
                file.swarm.interested(peer, loading=loading)
            return file.state()

    def unsubscribe(self, peer: StoreId, file_id: FileId) -> None:
        """Note that a peer wants to hear no more of a file, or is gone."""
        with self.changed:
            file = self._files.get(file_id)
            if file is None:
                return
            file.subscribers -= 1
            file.loading_peers.discard(peer)
            if file.swarm is not None:
                file.swarm.interested(peer, loading=False)
                self.changed.notify_all()
            self._forget_unneeded(file)

    def state(self, file_id: FileId) -> State | None:
        """Return what is told of a file."""
        with self.changed:
            file = self._files.get(file_id)
            return None if file is None else file.state()

    @contextmanager
    def borrow(self, file_id: FileId, index: int) -> Iterator[Borrowed | None]:
        """Keep a chunk in place while it is sent; None when it is neither here nor on its way."""
        with self.changed:
            self.changed.wait_for(lambda: not self._about_to_arrive(file_id, index), timeout=_BEGIN_SECONDS)
            file = self._files.get(file_id)
            memory = None if file is None else file.memory.get(index)
            arriving = None if file is None or memory is not None else file.arriving.get(index)
            if arriving is not None:
                memory = arriving.memory
            if file is not None and memory is not None:
                file.borrowed += 1
        if file is None or memory is None:
            yield None if file is None else file.on_disk(index)
            return
        try:
            offset = index * file.identity.chunk_bytes
            yield Borrowed(memory=memory, copy=None, offset=offset, length=len(memory), arriving=arriving)
        finally:
            self._give_back(file)

    def _about_to_arrive(self, file_id: FileId, index: int) -> bool:
        """Tell whether a chunk is claimed whose fetch has not begun: its thread has yet to wake up."""
        file = self._files.get(file_id)
        return (
            file is not None
            and file.swarm is not None
            and index not in file.memory
            and index not in file.arriving
            and bool(file.swarm.fetching >> index & 1)
        )

    def digest_of(self, file_id: FileId, index: int, memory: memoryview) -> bytes:
        """Return the 16 bytes of a borrowed chunk's digest; reckoned once."""
        with self.changed:
            file = self._files.get(file_id)
            known = None if file is None else file.digests.get(index)
        if known is not None:
            return known
        found = raw_digest(memory)
        with self.changed:
            if file is not None and index in file.memory:
                file.digests[index] = found
        return found

    def _give_back(self, file: SharedFile) -> None:
        with self.changed:
            file.borrowed -= 1
            idle: list[Callable[[], None]] = []
            if not file.borrowed and file.idle:
                idle, file.idle, file.holder = file.idle, [], None
            self._forget_unneeded(file)
        for call in idle:
            call()

    def _file(self, identity: FileIdentity) -> SharedFile | None:
        file = self._files.get(identity.file_id)
        if file is None and len(self._files) < MAX_FILES:
            file = self._files[identity.file_id] = SharedFile(identity=identity)
        return file

    def _forget_unneeded(self, file: SharedFile) -> None:
        if not file.needed():
            self._files.pop(file.identity.file_id, None)

    def _tell(self, file_id: FileId) -> None:
        for listener in self._listeners:
            listener(file_id)

    def tell(self, file_id: FileId) -> None:
        """Have peers told of a file: claims were made or given up."""
        self._tell(file_id)


def raw_digest(memory: memoryview | bytes) -> bytes:
    """Return the 16 bytes of the digest of `memory`."""
    return bytes.fromhex(digest(memory).rpartition(":")[2])

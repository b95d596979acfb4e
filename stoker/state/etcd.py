"""The etcd backend: the state in an etcd cluster (3.4 or newer), for several controllers.

Messages and stubs come from `etcd3aio`; how they are used is ours: which member is asked (`etcd_endpoints`),
how a watch resumes, what a lease's holder knows (`leases`). `docs/decisions/0003` says why.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing, asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb

from stoker.clock import Clock, SystemClock
from stoker.errors import InvalidRequest
from stoker.state.errors import LeaseLost, StateUnavailable
from stoker.state.etcd_endpoints import (
    FATAL,
    FIRST_PAUSE_SECONDS,
    HAS_LEADER,
    LONGEST_PAUSE_SECONDS,
    PAGE_KEYS,
    Endpoints,
    Member,
    refused,
)
from stoker.state.etcd_wire import ALL_KEYS, Keyspace, failed
from stoker.state.leases import Lease
from stoker.state.protocol import (
    DEFAULT_TIMEOUT_SECONDS,
    Changes,
    Committed,
    Compare,
    Conflict,
    LeaseId,
    Outcome,
    Resync,
    Snapshot,
    Versioned,
    WatchEvent,
    Write,
    check_transaction,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence


@asynccontextmanager
async def open_etcd(
    endpoints: Sequence[str],
    *,
    prefix: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    clock: Clock | None = None,
) -> AsyncGenerator[EtcdState, None]:
    """Open the state in etcd; connects at the first call.

    Args:
        endpoints: `host:port` of one or more members.
        prefix: In front of every key; empty, or ends with `/`.
        credentials: For TLS; None speaks plain HTTP/2.
        clock: What the holder of a lease counts by; etcd has its own.
    """
    members = Endpoints(endpoints, credentials)
    try:
        yield EtcdState(members, keyspace=Keyspace(prefix), clock=clock or SystemClock())
    finally:
        await members.close()


class _Compacted(Exception):
    """The watch asked for history that is gone, or that never was."""


class EtcdState:
    """A `StateStore` over etcd; made by `open_etcd`, belongs to one event loop."""

    def __init__(self, endpoints: Endpoints, *, keyspace: Keyspace, clock: Clock) -> None:
        self._endpoints = endpoints
        self._keyspace = keyspace
        self._clock = clock

    async def get(self, key: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Versioned | None:
        """Return the key as it stands; see the protocol."""
        answer = await self._range(
            pb.RangeRequest(key=self._keyspace.key(key)), timeout_seconds=timeout_seconds
        )
        return self._keyspace.versioned(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Snapshot:
        """Return all keys under `prefix`, page by page as of the first page's revision; see the protocol."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    snapshot = await self._pages(prefix, timeout_seconds)
                    if snapshot is not None:
                        return snapshot
        except TimeoutError as error:
            raise StateUnavailable(
                f"etcd did not list {prefix!r} within {timeout_seconds:g} s: it is overloaded, or there are "
                "too many keys for this time",
                retry_after_seconds=1.0,
            ) from error

    async def transact(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Write],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Outcome:
        """Write everything if every compare holds, else nothing; see the protocol."""
        check_transaction(compares, writes)
        request = self._keyspace.transaction(compares, writes)
        loop = asyncio.get_running_loop()
        end_seconds = loop.time() + timeout_seconds
        if not self._endpoints.connected():
            await self._revision(timeout_seconds=timeout_seconds)
        try:
            answer = await self._endpoints.once(
                lambda member, seconds: member.kv.Txn(request, timeout=seconds),
                "commit",
                timeout_seconds=end_seconds - loop.time(),
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise LeaseLost("a lease of this transaction is over: nothing was written") from error
            raise InvalidRequest(f"etcd refuses the transaction: {error.details()}") from error
        if answer.succeeded:
            return Committed(revision=answer.header.revision)
        found = self._keyspace.found(compares, answer.responses)
        return Conflict(
            revision=answer.header.revision, failed=failed(compares, found), found=MappingProxyType(found)
        )

    async def watch(
        self, prefix: str, *, after_revision: int | None = None
    ) -> AsyncGenerator[WatchEvent, None]:
        """Iterate over what happens under `prefix`; see the protocol."""
        revision = after_revision
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            self._endpoints.check_open()
            member = self._endpoints.member()
            try:
                if revision is None:
                    snapshot = await self.list(prefix)
                    revision = snapshot.revision
                    yield Resync(snapshot=snapshot)
                async with aclosing(self._stream(member, prefix, revision)) as stream:
                    async for changes in stream:
                        revision = changes.revision
                        pause_seconds = FIRST_PAUSE_SECONDS
                        yield changes
            except _Compacted:
                revision = None
                continue
            except grpc.aio.AioRpcError as error:
                if error.code() in FATAL:
                    raise refused(member, error) from error
            except (StateUnavailable, TimeoutError):
                pass  # `list` or the opening of the stream got no answer: as for any other failure
            self._endpoints.failed(member)
            self._endpoints.check_open()
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def grant(self, ttl_seconds: float, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Lease:
        """Return a new lease; see the protocol. etcd itself lets none live for less than about 2 s."""
        granted_seconds = self._clock.now_seconds()
        request = pb.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_seconds)))
        answer = await self._endpoints.until_answered(
            lambda member, seconds: member.lease.LeaseGrant(request, timeout=seconds),
            "grant a lease",
            timeout_seconds=timeout_seconds,
        )
        return Lease(
            LeaseId(answer.ID),
            ttl_seconds=answer.TTL,
            granted_seconds=granted_seconds,
            store=self,
            clock=self._clock,
        )

    async def renew(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Give the lease its whole time again; see the protocol."""

        async def keep_alive(member: Member, seconds: float) -> Any:
            stream = member.lease.LeaseKeepAlive(timeout=seconds, metadata=HAS_LEADER)
            try:
                await stream.write(pb.LeaseKeepAliveRequest(ID=lease_id))
                answer = await stream.read()
                if answer is grpc.aio.EOF:
                    raise StateUnavailable(f"etcd at {member.endpoint} hung up on the renewal of a lease")
                return answer
            finally:
                stream.cancel()

        answer = await self._endpoints.until_answered(
            keep_alive, "renew a lease", timeout_seconds=timeout_seconds
        )
        if answer.TTL <= 0:
            raise LeaseLost(f"lease {lease_id} is over: its keys are gone; ask for a new one")

    async def revoke(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """End the lease and delete its keys; see the protocol."""
        request = pb.LeaseRevokeRequest(ID=lease_id)
        try:
            await self._endpoints.until_answered(
                lambda member, seconds: member.lease.LeaseRevoke(request, timeout=seconds),
                "revoke a lease",
                timeout_seconds=timeout_seconds,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise

    async def compact(self, revision: int, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Forget history up to and including `revision`, of all of etcd; see the protocol."""
        request = pb.CompactionRequest(revision=revision)
        try:
            await self._endpoints.until_answered(
                lambda member, seconds: member.kv.Compact(request, timeout=seconds),
                "compact",
                timeout_seconds=timeout_seconds,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.OUT_OF_RANGE:
                raise
            if "future" in (error.details() or ""):
                raise InvalidRequest(
                    f"cannot compact up to revision {revision}: it is in the future"
                ) from error

    async def _stream(
        self, member: Member, prefix: str, after_revision: int
    ) -> AsyncGenerator[Changes, None]:
        """Iterate over changes until the stream breaks or ends.

        It asks for `after_revision` once more and drops it: where history was compacted at exactly the
        revision a watch starts from, etcd drops the deletions of that revision in silence.
        """
        key, range_end = self._keyspace.range(prefix)
        create = pb.WatchCreateRequest(
            key=key, range_end=range_end, start_revision=max(1, after_revision), fragment=True
        )
        stream = member.watch.Watch(metadata=HAS_LEADER)
        try:
            async with self._endpoints.waiting(DEFAULT_TIMEOUT_SECONDS):
                await stream.write(pb.WatchRequest(create_request=create))
                answer = await stream.read()
                if answer is not grpc.aio.EOF and answer.header.revision < after_revision:
                    await self._check_not_rewound(after_revision)
            events: list[Any] = []
            while answer is not grpc.aio.EOF:
                if answer.compact_revision:
                    raise _Compacted
                if answer.canceled:
                    return
                events.extend(answer.events)
                if not answer.fragment:
                    for changes in self._keyspace.changes(events, after_revision=after_revision):
                        yield changes
                    events.clear()
                async with self._endpoints.waiting():
                    answer = await stream.read()
        finally:
            stream.cancel()

    async def _check_not_rewound(self, revision: int) -> None:
        """Raise `_Compacted` where all of etcd, not just a member that lags, is not yet at `revision`.

        It is so after a restore from a backup.
        """
        if await self._revision(timeout_seconds=DEFAULT_TIMEOUT_SECONDS) < revision:
            raise _Compacted

    async def _revision(self, *, timeout_seconds: float) -> int:
        """Return the revision of all of etcd, from any member that answers."""
        request = pb.RangeRequest(key=ALL_KEYS, count_only=True)
        answer = await self._range(request, timeout_seconds=timeout_seconds)
        return int(answer.header.revision)

    async def _pages(self, prefix: str, timeout_seconds: float) -> Snapshot | None:
        """List; None where history was compacted between two pages."""
        first, range_end = self._keyspace.range(prefix)
        items: list[Versioned] = []
        revision = 0
        while True:
            request = pb.RangeRequest(key=first, range_end=range_end, limit=PAGE_KEYS, revision=revision)
            try:
                answer = await self._range(request, timeout_seconds=timeout_seconds)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                    return None
                raise
            items.extend(map(self._keyspace.versioned, answer.kvs))
            revision = revision or answer.header.revision
            if not answer.more:
                return Snapshot(revision=revision, items=tuple(items))
            first = answer.kvs[-1].key + b"\0"

    async def _range(self, request: Any, *, timeout_seconds: float) -> Any:
        return await self._endpoints.until_answered(
            lambda member, seconds: member.kv.Range(request, timeout=seconds),
            "answer a read",
            timeout_seconds=timeout_seconds,
        )

"""Which etcd member to ask, and how often: one channel per endpoint, failover, and errors made ours.

A call goes to the endpoint that answered last. One that fails or is silent makes way for the next one. Reads
and lease calls are tried again until their time is up; a transaction is sent once, and only over a connection
that stands, because nobody can tell whether a lost answer was a commit.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb

from stoker.errors import ConfigError
from stoker.state.errors import StateUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

HAS_LEADER = (("hasleader", "true"),)
"""Makes a member that lost its quorum refuse, instead of being silent."""

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0

PAGE_KEYS = 128
"""Keys read at once; with values of `MAX_TRANSACTION_BYTES` a page stays below the limit for a message."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 160 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses clients that ping more often than every 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

FATAL = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


class Member:
    """One endpoint: its channel and stubs."""

    def __init__(self, endpoint: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.endpoint = endpoint
        self.channel = (
            grpc.aio.secure_channel(endpoint, credentials, options=CHANNEL_OPTIONS)
            if credentials
            else grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        )
        self.kv: Any = pb.KVStub(self.channel)
        self.lease: Any = pb.LeaseStub(self.channel)
        self.watch: Any = pb.WatchStub(self.channel)


class Endpoints:
    """The members of one etcd cluster, as a client sees them.

    Args:
        endpoints: `host:port` each; names are resolved at every reconnection.
        credentials: For TLS; None speaks plain HTTP/2.
    """

    def __init__(self, endpoints: Sequence[str], credentials: grpc.ChannelCredentials | None = None) -> None:
        self._members = [Member(endpoint, credentials) for endpoint in endpoints]
        self._current = 0
        self._waits: set[asyncio.Timeout] = set()
        self._closed = False

    async def close(self) -> None:
        """Break all calls and connections off.

        gRPC's own close cancels some calls as if their tasks were cancelled and forgets others that are just
        being opened; so whoever waits is woken first, through the timeout it waits under.
        """
        self._closed = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(0)  # the timeouts fire
        for member in self._members:
            await member.channel.close()

    @asynccontextmanager
    async def waiting(self, seconds: float | None = None) -> AsyncGenerator[None, None]:
        """Bound what is awaited inside, and end it at `close`.

        Raises:
            TimeoutError: `seconds` are over; None is forever.
            StateUnavailable: Closed.
        """
        self.check_open()
        try:
            async with asyncio.timeout(seconds) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            self.check_open()
            raise

    def check_open(self) -> None:
        """Raise `StateUnavailable` after `close`."""
        if self._closed:
            raise StateUnavailable("state is closed: this process is stopping")

    def member(self) -> Member:
        """Return the member to ask now."""
        self.check_open()
        for step in range(len(self._members)):
            index = (self._current + step) % len(self._members)
            state = self._members[index].channel.get_state(try_to_connect=True)
            if state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self._current = index
                break
        return self._members[self._current]

    def connected(self) -> bool:
        """Return whether the member to ask now has a connection, as far as one can know."""
        return self.member().channel.get_state() is grpc.ChannelConnectivity.READY

    def failed(self, member: Member) -> None:
        """Ask another member next."""
        if self._members[self._current] is member:
            self._current = (self._current + 1) % len(self._members)

    async def once(
        self, call: Callable[[Member, float], Awaitable[Any]], what: str, *, timeout_seconds: float
    ) -> Any:
        """Ask one member, once.

        Args:
            call: Does it, given the member and the seconds it may take.
            what: For the message of an error.
            timeout_seconds: After which the call is over, one way or the other.

        Raises:
            StateUnavailable: No answer in time; what was asked may have happened or not.
            ConfigError: etcd refuses this client.
            grpc.aio.AioRpcError: Another status, for the caller to understand.
        """
        member = self.member()
        try:
            async with self.waiting(timeout_seconds):
                return await call(member, timeout_seconds)
        except TimeoutError as error:
            self.failed(member)
            raise self._unavailable(member, what, f"no answer within {timeout_seconds:g} s") from error
        except grpc.aio.AioRpcError as error:
            if error.code() in FATAL:
                raise refused(member, error) from error
            if error.code() not in TRANSIENT:
                raise
            self.failed(member)
            raise self._unavailable(member, what, error.details() or error.code().name) from error

    async def until_answered(
        self, call: Callable[[Member, float], Awaitable[Any]], what: str, *, timeout_seconds: float
    ) -> Any:
        """Ask one member after the other until one answers; only for what may happen twice.

        Raises:
            StateUnavailable: No answer in time.
            ConfigError: etcd refuses this client.
            grpc.aio.AioRpcError: Another status, for the caller to understand.
        """
        loop = asyncio.get_running_loop()
        end_seconds = loop.time() + timeout_seconds
        share_seconds = timeout_seconds / len(self._members)
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            remaining_seconds = end_seconds - loop.time()
            try:
                return await self.once(call, what, timeout_seconds=min(share_seconds, remaining_seconds))
            except StateUnavailable:
                if self._closed or loop.time() + pause_seconds >= end_seconds:
                    raise
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    def _unavailable(self, member: Member, what: str, why: str) -> StateUnavailable:
        return StateUnavailable(
            f"etcd at {member.endpoint} did not {what}: {why}; see that a majority of its members runs",
            retry_after_seconds=1.0,
        )


def refused(member: Member, error: grpc.aio.AioRpcError) -> ConfigError:
    """Return the error for an etcd that will not talk to this client."""
    return ConfigError(
        f"etcd at {member.endpoint} refuses this client ({error.details()}): check its users and certificates"
    )

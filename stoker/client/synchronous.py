"""The synchronous client: the asynchronous one, driven from a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from stoker.client.asynchronous import DEFAULT_TIMEOUT_SECONDS, AsyncClient
from stoker.errors import StokerError
from stoker.v1 import controller_pb2, inference_pb2, model_pb2

T = TypeVar("T")


class Client:
    """A blocking client for scripts; use as a context manager. Not to be shared between threads.

    Args and errors as in `AsyncClient`.
    """

    def __init__(self, *, gateway: str | None = None, controller: str | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._run(self._open(gateway, controller))
        self._answers: set[AsyncGenerator[Any, None]] = set()

    @staticmethod
    async def _open(gateway: str | None, controller: str | None) -> AsyncClient:
        return AsyncClient(gateway=gateway, controller=controller)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the answers still open, close the connections and the loop."""
        for answer in list(self._answers):
            self._run(answer.aclose())
        self._run(self._client.close())
        self._loop.close()

    def chat(
        self,
        model: str,
        messages: Sequence[tuple[str, str]],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        idempotency_key: str | None = None,
        last_event_id: str | None = None,
        **sampling: Any,
    ) -> Iterator[inference_pb2.TextEvent]:
        """See `AsyncClient.chat`."""
        return self._iterate(
            self._client.chat(
                model,
                messages,
                timeout_seconds=timeout_seconds,
                idempotency_key=idempotency_key,
                last_event_id=last_event_id,
                **sampling,
            )
        )

    def complete(
        self,
        model: str,
        prompt: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        idempotency_key: str | None = None,
        last_event_id: str | None = None,
        **sampling: Any,
    ) -> Iterator[inference_pb2.TextEvent]:
        """See `AsyncClient.complete`."""
        return self._iterate(
            self._client.complete(
                model,
                prompt,
                timeout_seconds=timeout_seconds,
                idempotency_key=idempotency_key,
                last_event_id=last_event_id,
                **sampling,
            )
        )

    def deploy(
        self, spec: model_pb2.ModelSpec, *, create_only: bool = False, dry_run: bool = False
    ) -> controller_pb2.DeployResponse:
        """See `AsyncClient.deploy`."""
        return self._run(self._client.deploy(spec, create_only=create_only, dry_run=dry_run))

    def delete(self, name: str) -> None:
        """See `AsyncClient.delete`."""
        self._run(self._client.delete(name))

    def models(self) -> Sequence[model_pb2.Model]:
        """See `AsyncClient.models`."""
        return self._run(self._client.models())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def _iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> T:
            return await anext(events)

        self._answers.add(events)
        try:
            while True:
                if self._loop.is_closed():
                    raise StokerError("the client was closed before the answer was over: open another one")
                try:
                    yield self._run(following())
                except StopAsyncIteration:
                    return
        finally:
            self._answers.discard(events)
            if not self._loop.is_closed():
                self._run(events.aclose())

"""The thread that drives an engine: steps while there is work, sleeps on a condition otherwise.

The asyncio shell of the worker owns one `EngineThread`. A step's outputs are handed over in one callback, so
that crossing into the event loop costs one `call_soon_threadsafe` per step and not one per token.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from services.worker.engine.step_times import StepTimes
from services.worker.engine.takeover import common_tokens
from stoker.errors import NotFound, StokerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine.protocol import Engine, Output, ResumeMode, Snapshot, Submit
    from stoker.ids import SessionId

T = TypeVar("T")


class EngineThread:
    """Runs one engine in its own thread.

    Args:
        engine: Handed over: only this class steps, snapshots and closes it from here on.
        on_outputs: Gets each step's outputs, in the engine's thread; must be quick and must not raise.
        on_failure: Gets the error that ended the thread: a step failed as a whole and the engine's state is
            unknown. The sessions get nothing further; the process should end.
        interrupt: Ends a step's wait for weights that are still arriving, so that the thread can do what it
            was asked to; the step is made again.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._interrupt = interrupt
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._closing = False
        self._steps = StepTimes()
        self._thread = threading.Thread(target=self._run, name="stoker-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """Return the engine, for the calls any thread may make (`limits`, `stats`)."""
        return self._engine

    @property
    def is_stepping(self) -> bool:
        """Say whether a step is under way."""
        return self._steps.is_stepping

    @property
    def is_late(self) -> bool:
        """Say whether the step under way takes longer than steps usually do."""
        return self._steps.is_late(time.monotonic())

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def submit(self, request: Submit) -> None:
        """Queue a session and wake the thread. Never waits for a step.

        Raises:
            InvalidRequest, ContextLengthExceeded, QueueFull: As `Engine.submit`.
        """
        self._engine.submit(request)
        self._wake()

    def resume(self, snapshot: Snapshot, mode: ResumeMode) -> None:
        """Queue a session where a snapshot left it and wake the thread."""
        self._engine.resume(snapshot, mode)
        self._wake()

    def take_over(self, earlier: SessionId, request: Submit) -> Future[None]:
        """Queue a session that goes on from an earlier one here, which ends; its KV is used where it fits.

        The future fails with what `submit` raises.
        """

        def work() -> None:
            try:
                common = common_tokens(request, self._engine.snapshot(earlier))
            except NotFound:  # it ended meanwhile
                self._engine.submit(request)
                return
            staged = self._engine.take_kv(earlier)
            self._engine.cancel(earlier)
            if staged is None:
                self._engine.submit(request)
                return
            staged.tokens = min(staged.tokens, common)
            try:
                self._engine.submit(replace(request, staged=staged))
            except StokerError:
                staged.release()
                raise

        return self.call(work)

    def cancel(self, session_id: SessionId) -> None:
        """End a session within one step; its `Finished` comes through `on_outputs`."""
        self._engine.cancel(session_id)
        self._wake()
        self._interrupt()

    def snapshot(self, session_id: SessionId, *, with_kv: bool = False) -> Future[Snapshot]:
        """Return a future of the session's snapshot, taken between two steps."""
        return self.call(lambda: self._engine.snapshot(session_id, with_kv=with_kv))

    def hold(self, session_id: SessionId, seconds: float) -> Future[int]:
        """Have a session stand still from between two steps on; see `Engine.hold`."""
        return self.call(lambda: self._engine.hold(session_id, seconds))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the engine's thread between two steps; at the latest `close` cancels it."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to who holds the future
                future.set_exception(error)

        with self._changed:
            if self._closing:
                future.cancel()
            else:
                self._calls.append(run)
                self._changed.notify()
        self._interrupt()
        return future

    def close(self, timeout_seconds: float = 5.0) -> bool:
        """Stop after the current step, close the engine; return False if the step outlived the timeout."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._interrupt()
        if self._thread.ident is None:
            self._engine.close()
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._steps.begin(time.monotonic())
                outputs = self._engine.step()
                self._steps.end(time.monotonic())
                if outputs:
                    self._on_outputs(outputs)
        except BaseException as error:  # noqa: BLE001 - the task boundary: hand the failure to the process
            self._on_failure(error)
        finally:
            self._engine.close()

    def _wait_for_work(self) -> bool:
        """Run queued calls, then block until there is a step to do; False when closing."""
        while True:
            with self._changed:
                while not (self._closing or self._calls or self._engine.has_work()):
                    self._changed.wait(self._engine.held_seconds())
                if self._closing:
                    return False
                calls, self._calls = self._calls, deque()
            for call in calls:
                call()
            if self._engine.has_work():
                return True

"""All sessions of this worker on one stream: commands in, one message per engine step out.

The engine's thread builds the message of a step and sends it over the link to the agent itself, so that a
token waits for no turn of the event loop. Where there is no link, or the agent must be told something else
first, the loop takes the message, for the `Run` call or the link. While the agent is slow to read, messages
wait: no more than the tokens that live sessions can still generate.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from services.worker import wire
from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import Finished, Output, Submit
from stoker import log
from stoker.errors import AlreadyExists, Fenced, InvalidRequest, NotFound, StokerError
from stoker.frames import Link
from stoker.ids import SessionId
from stoker.v1.model_pb2 import AdapterSpec
from stoker.v1.session_pb2 import GenerateRequest
from stoker.v1.worker_pb2 import LoadEnd, RunCommand, StepEvent

if TYPE_CHECKING:  # torch: imported only when the worker is warm
    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.engine.adapter_cache import AdapterCache
    from services.worker.kv.kv_desk import KvDesk


class RunStream:
    """Sessions of one engine, as the node agent sees them.

    Args:
        loop: Where `take`, `events` and `end` are called.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._owners: dict[SessionId, wire.Owner] = {}
        self._current: dict[str, SessionId] = {}
        self._numbers = itertools.count()
        self._waiting = StepEvent()
        self._news = asyncio.Event()
        self._has_reader = False
        self._link: Link | None = None
        self._handing = threading.Lock()
        self._handed = 0  # steps on their way through the loop: none may overtake them
        self._load_is_told = False
        self._adapters: AdapterCache | None = None
        self._leases: dict[SessionId, AdapterSpec] = {}
        self._kv: KvDesk | None = None

    # --- from the engine's thread ---

    def on_outputs(self, outputs: list[Output]) -> None:
        """Take a step's outputs; called in the engine's thread."""
        step = wire.step_event(outputs, self._owners)
        finished = [output.session_id for output in outputs if isinstance(output, Finished)]
        link = self._link
        with self._handing:
            is_direct = link is not None and self._load_is_told and not self._handed
            self._handed += not is_direct
        if link is None or not is_direct:
            self._loop.call_soon_threadsafe(self._take_step, step, finished)
            return
        if finished:
            self._loop.call_soon_threadsafe(self._let_go, finished)
        if step.sessions:
            link.send(step.SerializeToString())

    def fail(self, error: StokerError) -> None:
        """End every session with an error; called in the event loop."""
        owners = list(self._owners.values())
        self._owners.clear()
        self._current.clear()
        self._add(wire.errors_for(owners, error))

    # --- in the event loop ---

    def use(self, adapters: AdapterCache) -> None:
        """Take adapters of sessions from here; before this call no session may have one."""
        self._adapters = adapters

    def send_over(self, link: Link, *, is_loading: bool) -> None:
        """Send what the engine brings over a link from now on, which `events` then doesn't yield.

        Args:
            link: To the agent.
            is_loading: The end of the load is still to be announced, before any token.
        """
        self._link = link
        self._load_is_told = not is_loading
        if not self.is_flushed():
            self._tell()

    def expect_kv(self, desk: KvDesk) -> None:
        """Begin sessions with what has arrived of them at the desk."""
        self._kv = desk

    def engine_id(self, session_id: str, epoch: int) -> SessionId:
        """Return what the engine calls a session that runs here.

        Raises:
            NotFound: Nobody runs it here.
            Fenced: Another epoch's owner does.
        """
        engine_id = self._current.get(session_id)
        if engine_id is None:
            raise NotFound(f"session {session_id} does not run here")
        if self._owners[engine_id].epoch != epoch:
            raise Fenced(f"session {session_id} runs here under another epoch than {epoch}")
        return engine_id

    def announce(self, load_end: LoadEnd) -> None:
        """Tell the agent how the rest of the load went; no token goes out before."""
        self._waiting.load_end.CopyFrom(load_end)
        self._tell()

    def take(self, command: RunCommand, engine: EngineThread) -> None:
        """Do what the agent wants; a refusal becomes the session's last event."""
        match command.WhichOneof("command"):
            case "submit":
                self._submit(command.submit, engine)
            case "cancel":
                engine_id = self._current.get(command.cancel.session_id)
                if engine_id is not None:
                    self._release(engine_id)
                    engine.cancel(engine_id)
            case _:
                log.get().warning("worker.command_unknown", command=str(command))

    def _submit(self, request: GenerateRequest, engine: EngineThread) -> None:
        owner = wire.Owner(session_id=request.session_id, epoch=request.epoch)
        engine_id = SessionId(f"{request.session_id}/{request.epoch}/{next(self._numbers)}")
        try:
            wanted = wire.submit(request, engine_id)
            earlier_id = self._current.get(request.session_id)
            if earlier_id is not None:
                self._end_earlier(earlier_id, request)
            self._owners[engine_id] = owner
            self._current[request.session_id] = engine_id
            if request.HasField("adapter"):
                self._submit_adapted(request.adapter, wanted, earlier_id, engine)
            else:
                self._start(wanted, earlier_id, engine)
        except StokerError as error:
            self._refuse(engine_id, owner, error)

    def _start(self, wanted: Submit, earlier_id: SessionId | None, engine: EngineThread) -> None:
        if earlier_id is None:
            self._begin(wanted, engine)
            return
        owner = self._owners[wanted.session_id]
        taken = engine.take_over(earlier_id, wanted)
        taken.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._note_taken, done, wanted.session_id, owner)
        )

    def _begin(self, wanted: Submit, engine: EngineThread) -> None:
        session_id = self._owners[wanted.session_id].session_id
        staged = None if self._kv is None else self._kv.claim(session_id, wanted)
        if self._kv is None or staged is None:
            engine.submit(wanted)
            return
        try:
            engine.submit(replace(wanted, staged=staged))
        except StokerError:
            self._kv.release(staged)
            raise

    def _submit_adapted(
        self, adapter: AdapterSpec, wanted: Submit, earlier_id: SessionId | None, engine: EngineThread
    ) -> None:
        """Start a session with its adapter, at once if that is in memory."""
        if self._adapters is None:
            raise InvalidRequest(f"this worker serves no adapters, asked for was {adapter.name!r}")
        coming = self._adapters.lease(adapter)
        if not coming.done():
            if earlier_id is not None:  # rare: its adapter was let go of, so it has ended; its KV is lost
                engine.cancel(earlier_id)
                earlier_id = None
            owner = self._owners[wanted.session_id]
            coming.add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(
                    self._start_adapted, done, adapter, wanted, owner, engine
                )
            )
            return
        weights = coming.result()
        self._leases[wanted.session_id] = adapter
        self._start(replace(wanted, adapter=weights), earlier_id, engine)

    def _start_adapted(
        self,
        came: Future[AdapterWeights],
        adapter: AdapterSpec,
        wanted: Submit,
        owner: wire.Owner,
        engine: EngineThread,
    ) -> None:
        """Start a session whose adapter has come, or not; unless it was cancelled meanwhile."""
        engine_id = wanted.session_id
        error = came.exception()
        if error is None:
            self._leases[engine_id] = adapter
        if self._owners.get(engine_id) is not owner:
            self._end_lease(engine_id)
            return
        try:
            if isinstance(error, StokerError):
                raise error
            self._start(replace(wanted, adapter=came.result()), None, engine)
        except StokerError as refusal:
            self._refuse(engine_id, owner, refusal)

    def _refuse(self, engine_id: SessionId, owner: wire.Owner, error: StokerError) -> None:
        if self._owners.get(engine_id) is owner:
            self._release(engine_id)
        self._end_lease(engine_id)
        self._add(wire.errors_for([owner], error))

    def _end_earlier(self, earlier_id: SessionId, request: GenerateRequest) -> None:
        """Take the session from its present owner here, whose tokens belong to nobody from now on."""
        epoch = self._owners[earlier_id].epoch
        if request.epoch <= epoch:
            raise Fenced(
                f"session {request.session_id} runs here under epoch {epoch}; epoch {request.epoch} is late"
            )
        self._release(earlier_id)

    def _note_taken(self, taken: Future[None], engine_id: SessionId, owner: wire.Owner) -> None:
        if taken.cancelled():
            return  # the engine is closing: `fail` tells everybody
        error = taken.exception()
        if error is not None:
            self._end_lease(engine_id)
        if error is not None and self._owners.get(engine_id) is owner:
            self._release(engine_id)
            told = error if isinstance(error, StokerError) else wire.engine_failed(error)
            self._add(wire.errors_for([owner], told))

    async def events(self) -> AsyncIterator[StepEvent]:
        """Yield what the engine brings, for ever; one reader at a time.

        Raises:
            AlreadyExists: There is a reader already.
        """
        if self._has_reader:
            raise AlreadyExists("this worker's Run stream is taken")
        self._has_reader = True
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                step, self._waiting = self._waiting, StepEvent()
                yield step
        finally:
            self._has_reader = False

    def cancel_all(self, engine: EngineThread) -> None:
        """End every session: their reader has gone."""
        for engine_id in list(self._owners):
            self._release(engine_id)
            engine.cancel(engine_id)

    def is_flushed(self) -> bool:
        """Tell whether nothing waits to be read."""
        return not self._waiting.sessions and not self._waiting.HasField("load_end")

    def _take_step(self, step: StepEvent, finished: list[SessionId]) -> None:
        """Take a step that the engine's thread did not send itself."""
        self._let_go(finished)
        self._add(step)
        with self._handing:
            self._handed -= 1

    def _let_go(self, finished: list[SessionId]) -> None:
        for engine_id in finished:
            self._release(engine_id)
            self._end_lease(engine_id)

    def _add(self, step: StepEvent) -> None:
        if not step.sessions:
            return
        if self.is_flushed():
            self._waiting = step
        else:
            self._waiting.sessions.MergeFrom(step.sessions)
        self._tell()

    def _tell(self) -> None:
        """Send what waits, or have the call's reader take it."""
        if self._link is None:
            self._news.set()
            return
        step, self._waiting = self._waiting, StepEvent()
        self._link.send(step.SerializeToString())
        self._load_is_told = self._load_is_told or step.HasField("load_end")

    def _end_lease(self, engine_id: SessionId) -> None:
        """Let go of a session's adapter, once the engine has no use for it."""
        adapter = self._leases.pop(engine_id, None)
        if adapter is not None and self._adapters is not None:
            self._adapters.release(adapter)

    def _release(self, engine_id: SessionId) -> None:
        owner = self._owners.pop(engine_id, None)
        if owner is not None and self._current.get(owner.session_id) == engine_id:
            del self._current[owner.session_id]

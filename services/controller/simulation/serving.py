"""Requests of a simulated cluster: they wait, are served by replicas, end, or are given up.

Who finds a place is served at once, by the fullest of its model's ready replicas; the others queue, in the
order in which they came. No policy decides here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from services.controller.simulation.clock import VirtualClock
from services.controller.simulation.hardware import ModelSpec
from services.controller.simulation.parts import Changes, Counters, Session, SimReplica
from services.controller.simulation.workload import Request
from stoker.ids import ModelName


class Serving:
    """The sessions of a world.

    Args:
        clock: The world's.
        models: What is served.
        replicas: Of each model, those on devices; the world's own, seen as it changes.
        changes: Where to say what has changed.
        counters: Where to count.
        ask: Has the policy decide.
        timeout_seconds: A request that waits longer is lost.
    """

    def __init__(  # noqa: PLR0913 - what it shares with its world, each named
        self,
        clock: VirtualClock,
        models: Mapping[ModelName, ModelSpec],
        replicas: Mapping[ModelName, Mapping[SimReplica, None]],
        *,
        changes: Changes,
        counters: Counters,
        ask: Callable[[], None],
        timeout_seconds: float,
    ) -> None:
        self.sessions: list[Session] = []
        self.queues: dict[ModelName, deque[Session]] = {name: deque() for name in models}
        self.waiting: dict[ModelName, None] = {}
        """Models with a queue, in the order in which theirs began."""
        self.idle: dict[SimReplica, None] = {}
        """Ready replicas that serve nobody, the longest unused first."""
        self._clock = clock
        self._replicas = replicas
        self._changes = changes
        self._counters = counters
        self._ask = ask
        self._timeout_seconds = timeout_seconds

    def arrive(self, request: Request) -> None:
        """A request comes: serve it, or have it wait."""
        session = Session(request, self._clock.now_seconds)
        self.sessions.append(session)
        self.enqueue(session)
        if session.started_seconds is None:
            self._clock.after(self._timeout_seconds, lambda: self._give_up(session))

    def enqueue(self, session: Session, *, first: bool = False) -> None:
        """Have a session wait for a place, before all others if it is the `first`."""
        name = session.request.model
        queue = self.queues[name]
        session.waiting_since_seconds = self._clock.now_seconds
        if first:
            queue.appendleft(session)
        else:
            queue.append(session)
        self._changes.queues[name] = None
        self.serve(name)
        if queue:
            session.cold = session.cold or session in queue
            self.waiting.setdefault(name)
        self._ask()

    def longest_since_seconds(self, name: ModelName) -> float | None:
        """Return since when the one of a model's queue that has waited longest does; None = none waits."""
        queue = self.queues[name]
        return min([session.began_to_wait_seconds for session in queue]) if queue else None

    def serve(self, name: ModelName) -> None:
        """Give waiting sessions to ready replicas with a place, the fullest first."""
        queue = self.queues[name]
        if queue:
            self._changes.queues[name] = None
            while queue and (replica := _fullest(self._replicas[name])) is not None:
                self._begin(queue.popleft(), replica)
        if not queue:
            self.waiting.pop(name, None)

    def _begin(self, session: Session, replica: SimReplica) -> None:
        now_seconds, model, device = self._clock.now_seconds, replica.model, replica.node.spec.device
        session.wait_seconds += now_seconds - session.waiting_since_seconds
        if session.started_seconds is None:
            session.started_seconds = now_seconds
        request = session.request
        tokens = request.input_tokens + session.kept_tokens
        prefill_seconds = max(
            model.compute_seconds(device, tokens, len(replica.devices)), replica.token_seconds
        )
        if session.first_token_seconds is None:
            session.first_token_seconds = now_seconds + prefill_seconds
        decode_seconds = replica.token_seconds * (request.output_tokens - session.kept_tokens - 1)
        session.replica = replica
        ends_seconds = now_seconds + prefill_seconds + decode_seconds
        self._occupy(replica, session, ends_seconds)
        self._end_at(session, ends_seconds)

    def move(self, session: Session, target: SimReplica, *, pause_seconds: float) -> None:
        """Have another replica go on with a session, after a pause."""
        if session.replica is not None:
            self._leave(session.replica, session)
        session.replica = target
        session.migrations += 1
        ends_seconds = session.ends_seconds + pause_seconds
        self._occupy(target, session, ends_seconds)
        self._end_at(session, ends_seconds)

    def interrupt(self, session: Session, *, keep_tokens: bool) -> None:
        """Take a running session off its replica; it goes on after its last token, or begins again."""
        replica, tokens = session.replica, self.tokens_of(session) - session.request.input_tokens
        session.kept_tokens = min(tokens, session.request.output_tokens - 1) if keep_tokens else 0
        session.version += 1
        session.replica = None
        session.preemptions += not keep_tokens
        if replica is not None:
            self._leave(replica, session)

    def tokens_of(self, session: Session) -> int:
        """Return how many tokens a running session has by now, its prompt included."""
        replica = session.replica
        if replica is None or session.first_token_seconds is None:
            return session.request.input_tokens
        left_seconds = session.ends_seconds - self._clock.now_seconds
        left = int(max(0.0, left_seconds) / max(1e-9, replica.token_seconds))
        return session.request.input_tokens + max(0, session.request.output_tokens - left)

    def context_tokens(self, replica: SimReplica) -> int:
        """Return how many tokens a replica's sessions have by now together, their prompts included."""
        now_seconds, token_seconds = self._clock.now_seconds, max(1e-9, replica.token_seconds)
        tokens = 0
        for ends_seconds, input_tokens, output_tokens in replica.sessions.values():
            tokens += input_tokens
            left_seconds = ends_seconds - now_seconds
            left = int(left_seconds / token_seconds) if left_seconds > 0 else 0
            if left < output_tokens:
                tokens += output_tokens - left
        return tokens

    def _occupy(self, replica: SimReplica, session: Session, ends_seconds: float) -> None:
        if not replica.sessions:
            self._busy(replica, begins=True)
            replica.idle_since_seconds = None
            self.idle.pop(replica, None)
        request = session.request
        replica.sessions[session] = (ends_seconds, request.input_tokens, request.output_tokens)
        self._changes.replicas[replica] = None

    def _leave(self, replica: SimReplica, session: Session) -> None:
        del replica.sessions[session]
        if not replica.sessions:
            self._busy(replica, begins=False)
            replica.idle_since_seconds = self._clock.now_seconds
            self.idle[replica] = None
        self._changes.replicas[replica] = None

    def _busy(self, replica: SimReplica, *, begins: bool) -> None:
        sign = -1 if begins else 1
        self._counters.busy_device_seconds += sign * self._clock.now_seconds * len(replica.devices)

    def _end_at(self, session: Session, seconds: float) -> None:
        session.version += 1
        session.ends_seconds = seconds
        version = session.version
        self._clock.at(seconds, lambda: self._end(session, version))

    def _end(self, session: Session, version: int) -> None:
        replica = session.replica
        if session.version != version or replica is None:
            return
        session.replica = None
        self._leave(replica, session)
        self.serve(replica.model.name)
        self._ask()

    def _give_up(self, session: Session) -> None:
        """Lose a request that waited too long, if it still waits for its first start."""
        if session.started_seconds is not None or session.lost:
            return
        name = session.request.model
        session.lost = True
        session.wait_seconds += self._clock.now_seconds - session.waiting_since_seconds
        self.queues[name].remove(session)
        self._changes.queues[name] = None
        if not self.queues[name]:
            self.waiting.pop(name, None)
        self._ask()


def _fullest(replicas: Iterable[SimReplica]) -> SimReplica | None:
    """Return the replica with the fewest places left, the first of equal ones; None = none has any."""
    fullest, least = None, 0
    for replica in replicas:
        free = replica.free_places
        if free > 0 and (fullest is None or free < least):
            fullest, least = replica, free
            if free == 1:
                break
    return fullest

"""A session: one choice of one request, from its prompt's tokens to its text. Pure.

The session is the request's whole truth: prompt tokens, adapter, sampling (with its seed), tokens received so
far, and its epoch. Whatever replica serves it next gets exactly that (`generate_request`), so any replica can
go on where another one stopped. Tokens become text here, once: what was shown never depends on who made it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.gateway.sessions.waited import Waited
from services.gateway.text.model_text import ModelText
from services.gateway.text.stop_strings import StopFilter
from stoker.errors import Fenced, PeerError, WorkerDied
from stoker.ids import SessionId
from stoker.v1 import model_pb2, session_pb2

STOP = "stop"
LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that stood at a position, chosen or not."""

    raw: bytes
    """The token's own bytes; they may end inside a character."""
    logprob: float
    """Natural log of its probability."""

    @property
    def text(self) -> str:
        """Return the token as text, U+FFFD where its bytes are no character."""
        return self.raw.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken(Alternative):
    """A token of the answer with what else was likely there."""

    offset: int
    """Where its text begins in the answer, in characters."""
    top: tuple[Alternative, ...]
    """Most likely first; as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What an event added to the answer."""

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    """Those whose text is shown by now; empty unless log probabilities were asked for."""
    finish_reason: str | None = None
    """`stop` or `length` on the last delta."""
    received: int = 0
    """Tokens of the session with those of this delta."""


class Session:
    """One choice's state.

    Args:
        session_id: Its name, unique in the cluster.
        prompt_token_ids: The prompt.
        sampling: How to choose tokens; the seed is in it.
        text: The model's text side.
        stop: Strings that end the answer.
        adapter: What is added to the model, on every replica that serves the session.
        keep_seconds: How long it goes on without a gateway, its tokens kept; 0 = not at all.
        fingerprint: Of the client's request, with `keep_seconds`.

    Attributes:
        token_ids: Tokens received, in order; with the prompt and the sampling all there is to know.
        epoch: Raised each time the session gets a new owner; tokens of an earlier one are refused.
        finish_reason: None while it goes on.
        waited: Its waits so far; kept by who runs it.
    """

    def __init__(  # noqa: PLR0913 - all that a session is
        self,
        *,
        session_id: SessionId,
        prompt_token_ids: Sequence[int],
        sampling: session_pb2.Sampling,
        text: ModelText,
        stop: Sequence[str] = (),
        adapter: model_pb2.AdapterSpec | None = None,
        keep_seconds: float = 0.0,
        fingerprint: bytes = b"",
    ) -> None:
        self.session_id = session_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.adapter = adapter
        self._keep_seconds = keep_seconds
        self._fingerprint = fingerprint
        self.token_ids: list[int] = []
        self.epoch = 0
        self._highest_epoch = 0
        self.finish_reason: str | None = None
        self.waited = Waited()
        self._text = text
        self._detokenizer = text.detokenizer()
        self._stops = StopFilter(stop)
        self._decoded_characters = 0
        self._shown_characters = 0
        self._unshown: deque[ScoredToken] = deque()  # as short as the text held back

    def generate_request(
        self,
        *,
        model: str,
        replica_id: str,
        request_id: str,
        now_seconds: float = 0.0,
        resume_mode: session_pb2.ResumeMode.ValueType = session_pb2.RESUME_MODE_EXACT,
    ) -> session_pb2.GenerateRequest:
        """Return the order to a replica to begin, or to go on after the tokens received so far.

        Args:
            model: The session's.
            replica_id: Whose order it is.
            request_id: For logs.
            now_seconds: The clock of its waits.
            resume_mode: How tokens get into the replica.
        """
        return session_pb2.GenerateRequest(
            model=model,
            replica_id=replica_id,
            session_id=self.session_id,
            epoch=self.epoch,
            prompt_token_ids=self.prompt_token_ids,
            generated_token_ids=self.token_ids,
            sampling=self.sampling,
            request_id=request_id,
            resume_mode=resume_mode,
            adapter=self.adapter,
            keep_seconds=self._keep_seconds,
            fingerprint=self._fingerprint,
            waited_seconds=self.waited.seconds(now_seconds),
        )

    @property
    def token_count(self) -> int:
        """Return how many tokens there are, prompt and output."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    def own_after(self, epoch: int) -> None:
        """Own the session from the epoch after `epoch`, the highest known, before it has run here."""
        self.epoch = self._highest_epoch = epoch + 1

    def claim_epoch(self) -> int:
        """Return an epoch higher than any before; its owner owns the session once `epoch` is set to it."""
        self._highest_epoch += 1
        return self._highest_epoch

    def feed(self, event: session_pb2.GenerateEvent) -> Delta:
        """Take a step's tokens; return what they add. After `finish_reason` is set nothing may follow.

        Raises:
            Fenced: The event comes from an earlier owner; nothing of it was taken.
            PeerError: The event leaves a gap after the tokens received, or repeats some.
            WorkerDied: The worker gave the session up.
        """
        self._check_order(event)
        pieces: list[str] = []
        ends = event.finish_reason
        for index, token in enumerate(event.tokens):
            self.token_ids.append(token.id)
            is_end = ends == session_pb2.FINISH_REASON_STOP and index == len(event.tokens) - 1
            if not is_end:  # the stop token itself is no part of the answer
                pieces.append(self._show(token))
            if self._stops.matched is not None:
                return self._finish(STOP, pieces)
        if ends == session_pb2.FINISH_REASON_UNSPECIFIED:
            return self._delta(pieces)
        if ends not in (session_pb2.FINISH_REASON_STOP, session_pb2.FINISH_REASON_LENGTH):
            raise WorkerDied(f"the worker gave up session {self.session_id}; send the request again")
        pieces.append(self._filter(self._detokenizer.flush()))
        if self._stops.matched is None:
            pieces.append(self._stops.flush())
            return self._finish(STOP if ends == session_pb2.FINISH_REASON_STOP else LENGTH, pieces)
        return self._finish(STOP, pieces)

    def _check_order(self, event: session_pb2.GenerateEvent) -> None:
        if event.epoch != self.epoch:
            raise Fenced(f"session {self.session_id} is in epoch {self.epoch}, the event is of {event.epoch}")
        if event.tokens and event.position != len(self.token_ids):
            raise PeerError(
                f"session {self.session_id} has {len(self.token_ids)} tokens, the worker sent position "
                f"{event.position}: tokens are missing or repeated"
            )

    def _show(self, token: session_pb2.Token) -> str:
        piece = self._detokenizer.push(token.id)
        if self.sampling.HasField("top_logprobs"):
            self._unshown.append(self._scored(token))
        self._decoded_characters += len(piece)
        return self._filter(piece)

    def _filter(self, piece: str) -> str:
        if len(self.token_ids) <= self.sampling.min_tokens:
            return piece
        return self._stops.push(piece)

    def _scored(self, token: session_pb2.Token) -> ScoredToken:
        return ScoredToken(
            raw=self._text.token_bytes(token.id),
            logprob=token.logprob,
            offset=self._decoded_characters,
            top=tuple(
                Alternative(raw=self._text.token_bytes(other.id), logprob=other.logprob)
                for other in token.top_logprobs
            ),
        )

    def _finish(self, reason: str, pieces: list[str]) -> Delta:
        self.finish_reason = reason
        return self._delta(pieces)

    def _delta(self, pieces: list[str]) -> Delta:
        text = "".join(pieces)
        if not self._unshown:  # the hot path: no log probabilities
            return Delta(text=text, finish_reason=self.finish_reason, received=len(self.token_ids))
        self._shown_characters += len(text)
        return Delta(
            text=text,
            tokens=tuple(self._take_shown()),
            finish_reason=self.finish_reason,
            received=len(self.token_ids),
        )

    def _take_shown(self) -> Iterator[ScoredToken]:
        """Give out the tokens whose text began to show; at the end, those before the stop string."""
        cut = self._stops.matched is not None
        while self._unshown:
            at = self._unshown[0].offset
            if at >= self._shown_characters and (cut or self.finish_reason is None):
                return
            yield self._unshown.popleft()

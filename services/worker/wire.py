"""Between the wire's messages and the engine's: pure, and lean, since every token passes here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from services.worker.engine import protocol
from stoker.errors import PeerError, StokerError, WorkerDied
from stoker.ids import SessionId
from stoker.v1 import session_pb2, worker_pb2

FINISH_REASONS = {
    protocol.FinishReason.STOP: session_pb2.FINISH_REASON_STOP,
    protocol.FinishReason.LENGTH: session_pb2.FINISH_REASON_LENGTH,
    protocol.FinishReason.CANCELLED: session_pb2.FINISH_REASON_CANCELLED,
}
RESUME_MODES = {
    session_pb2.RESUME_MODE_UNSPECIFIED: protocol.ResumeMode.EXACT,
    session_pb2.RESUME_MODE_EXACT: protocol.ResumeMode.EXACT,
    session_pb2.RESUME_MODE_FAST: protocol.ResumeMode.FAST,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose tokens an engine's session yields: the engine knows no epochs."""

    session_id: str
    epoch: int


def command(frame: bytes) -> worker_pb2.RunCommand:
    """Return the command in a frame of the agent's.

    Raises:
        PeerError: There is none in it.
    """
    try:
        return worker_pb2.RunCommand.FromString(frame)
    except DecodeError as error:
        raise PeerError(f"a frame of the node agent is no command: {error}") from error


def submit(request: session_pb2.GenerateRequest, engine_id: SessionId) -> protocol.Submit:
    """Return the engine's request.

    Args:
        request: As the gateway made it; unset top_p and repetition_penalty (0) mean off.
        engine_id: What the engine shall call the session.

    Raises:
        InvalidRequest: A sampling parameter is out of range.
    """
    return protocol.Submit(
        session_id=engine_id,
        prompt_token_ids=list(request.prompt_token_ids),
        generated_token_ids=list(request.generated_token_ids),
        resume_mode=RESUME_MODES.get(request.resume_mode, protocol.ResumeMode.EXACT),
        sampling=sampling(request.sampling),
    )


def sampling(wanted: session_pb2.Sampling) -> protocol.Sampling:
    """Return the engine's sampling; raises InvalidRequest when a value is out of range."""
    return protocol.Sampling(
        temperature=wanted.temperature,
        top_p=wanted.top_p or 1.0,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty or 1.0,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=dict(wanted.logit_bias),
        seed=wanted.seed,
        max_tokens=wanted.max_tokens,
        min_tokens=wanted.min_tokens,
        stop_token_ids=frozenset(wanted.stop_token_ids),
        ignore_eos=wanted.ignore_eos,
        top_logprobs=wanted.top_logprobs if wanted.HasField("top_logprobs") else None,
    )


def step_event(outputs: Sequence[protocol.Output], owners: Mapping[SessionId, Owner]) -> worker_pb2.StepEvent:
    """Return one step's outputs as one message: one event per session that has an owner."""
    step = worker_pb2.StepEvent()
    events: dict[SessionId, worker_pb2.SessionEvent] = {}
    for output in outputs:
        owner = owners.get(output.session_id)
        if owner is None:
            continue
        item = events.get(output.session_id)
        if item is None:
            item = events[output.session_id] = step.sessions.add(session_id=owner.session_id)
            item.event.epoch = owner.epoch
            item.event.position = (
                output.position if isinstance(output, protocol.TokenOut) else output.generated_token_count
            )
        if isinstance(output, protocol.TokenOut):
            _add_token(item.event, output)
        elif output.reason is protocol.FinishReason.ERROR:
            item.error.CopyFrom(error_message(StokerError(output.message)))
            item.epoch = owner.epoch
        else:
            item.event.finish_reason = FINISH_REASONS[output.reason]
            _set_timings(item.event.timings, output.timings)
    return step


def _add_token(event: session_pb2.GenerateEvent, output: protocol.TokenOut) -> None:
    token = event.tokens.add(id=output.token_id)
    if output.logprob is not None:
        token.logprob = output.logprob
        for top in output.top_logprobs:
            token.top_logprobs.add(id=top.token_id, logprob=top.logprob)
    if output.timings is not None:
        _set_timings(event.timings, output.timings)


def _set_timings(message: session_pb2.SessionTimings, timings: protocol.SessionTimings) -> None:
    message.queue_seconds = timings.queue_seconds
    message.prefill_seconds = timings.prefill_seconds
    message.decode_seconds = timings.decode_seconds


def error_message(error: StokerError) -> worker_pb2.SessionError:
    """Return an error as it travels to the node agent."""
    return worker_pb2.SessionError(code=error.code, message=error.message)


def errors_for(owners: Sequence[Owner], error: StokerError) -> worker_pb2.StepEvent:
    """Return the message that ends these sessions with an error."""
    return worker_pb2.StepEvent(
        sessions=[
            worker_pb2.SessionEvent(
                session_id=owner.session_id, epoch=owner.epoch, error=error_message(error)
            )
            for owner in owners
        ]
    )


def engine_failed(cause: BaseException) -> WorkerDied:
    """Return the error of every session when a step failed as a whole."""
    return WorkerDied(f"the engine failed and its worker ends: {type(cause).__name__}: {cause}")

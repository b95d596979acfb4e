"""Between the wire's messages and the engine's."""

from __future__ import annotations

import pytest

from services.worker import wire
from services.worker.engine import protocol
from stoker.errors import InvalidRequest
from stoker.ids import SessionId
from stoker.v1 import session_pb2, worker_pb2

ID = SessionId("ses-1/4/0")
OWNERS = {ID: wire.Owner(session_id="ses-1", epoch=4)}


def test_a_request_keeps_every_field() -> None:
    sampling = session_pb2.Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={3: -1.5},
        seed=2**64 - 1,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        top_logprobs=0,
    )
    request = session_pb2.GenerateRequest(
        session_id="ses-1",
        prompt_token_ids=[1, 2],
        generated_token_ids=[8],
        resume_mode=session_pb2.RESUME_MODE_FAST,
        sampling=sampling,
    )

    assert wire.submit(request, ID) == protocol.Submit(
        session_id=ID,
        prompt_token_ids=[1, 2],
        generated_token_ids=[8],
        resume_mode=protocol.ResumeMode.FAST,
        sampling=protocol.Sampling(
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.75,
            logit_bias={3: -1.5},
            seed=2**64 - 1,
            max_tokens=9,
            min_tokens=2,
            stop_token_ids=frozenset({5, 6}),
            ignore_eos=True,
            top_logprobs=0,
        ),
    )


def test_what_is_not_set_is_off() -> None:
    made = wire.sampling(session_pb2.Sampling(max_tokens=1))

    assert (made.top_p, made.repetition_penalty, made.top_logprobs) == (1.0, 1.0, None)


def test_a_limit_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        wire.sampling(session_pb2.Sampling())


def test_one_step_is_one_event_per_session_with_its_tokens_and_its_end() -> None:
    timings = protocol.SessionTimings(queue_seconds=0.5, prefill_seconds=0.25, decode_seconds=2.0)
    outputs: list[protocol.Output] = [
        protocol.TokenOut(session_id=ID, position=3, token_id=11),
        protocol.TokenOut(
            session_id=ID,
            position=4,
            token_id=12,
            logprob=-0.5,
            top_logprobs=(protocol.TokenLogprob(token_id=12, logprob=-0.5),),
        ),
        protocol.Finished(
            session_id=ID,
            reason=protocol.FinishReason.LENGTH,
            prompt_token_count=2,
            generated_token_count=5,
            timings=timings,
        ),
    ]
    step = wire.step_event(outputs, OWNERS)
    (item,) = step.sessions

    assert (item.session_id, item.event.epoch, item.event.position) == ("ses-1", 4, 3)
    assert [token.id for token in item.event.tokens] == [11, 12]
    assert item.event.tokens[1].logprob == -0.5
    assert [top.id for top in item.event.tokens[1].top_logprobs] == [12]
    assert item.event.finish_reason == session_pb2.FINISH_REASON_LENGTH
    assert item.event.timings.decode_seconds == 2.0


def test_an_end_alone_stands_after_the_tokens_that_were_generated() -> None:
    finished = protocol.Finished(
        session_id=ID, reason=protocol.FinishReason.CANCELLED, prompt_token_count=2, generated_token_count=5
    )

    assert wire.step_event([finished], OWNERS).sessions[0].event.position == 5


def test_a_session_that_the_engine_gave_up_ends_with_an_error() -> None:
    finished = protocol.Finished(
        session_id=ID,
        reason=protocol.FinishReason.ERROR,
        prompt_token_count=2,
        generated_token_count=5,
        message="logits are not finite",
    )
    (item,) = wire.step_event([finished], OWNERS).sessions

    assert (item.WhichOneof("outcome"), item.error.code) == ("error", "internal_error")
    assert item.error.message == "logits are not finite"


def test_outputs_of_sessions_that_nobody_owns_are_left_out() -> None:
    outputs = [protocol.TokenOut(session_id=SessionId("ses-2/1/0"), position=0, token_id=1)]

    assert wire.step_event(outputs, OWNERS) == worker_pb2.StepEvent()

"""Replicas of one model on real processes: one of two is stopped, one is crowded, one is of two ranks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from stoker.checkpoint.convert import convert
from stoker.rpc import connect
from stoker.v1 import model_pb2
from stoker.v1.node_agent_pb2 import REPLICA_STATE_READY, GetReportRequest, StopReplicaRequest
from stoker.v1.node_agent_pb2_grpc import NodeAgentStub
from tests.integration.end_to_end.stoker_up import StokerUp, assert_all_ended, stoker
from tests.integration.tiny_model import make_tiny_model

QUESTION = [{"role": "user", "content": "the quick brown fox"}]
SAMPLED = {"seed": 5, "temperature": 0.8, "max_tokens": 400}
TOKENS = 48
GREEDY = {"temperature": 0, "max_tokens": TOKENS}
AFTER_CHUNKS = 4
"""Of a stream, something happens."""


def stream(
    up: StokerUp, model: str = "m", meanwhile: Callable[[], object] = lambda: None, **sampling: Any
) -> str:
    """Return the text, greedy unless said otherwise; call back in mid-stream."""
    text = ""
    with up.openai() as client:
        chunks = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            stream=True,
            extra_body={"ignore_eos": True},
            **(sampling or GREEDY),
        )
        for number, chunk in enumerate(chunks):
            if number == AFTER_CHUNKS:
                meanwhile()
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return text


def test_a_replica_that_is_stopped_while_it_streams_hands_its_session_over(
    up: StokerUp, tiny_model: Path
) -> None:
    spec = model_pb2.ModelSpec(
        name="pair", checkpoint_uri=str(tiny_model), keep_alive_seconds=-1, min_replicas=2, max_replicas=2
    )
    with up.client() as client:
        client.deploy(spec)
    asyncio.run(_until_two_are_ready(up))
    wanted = stream(up, "pair", **SAMPLED)

    def stop_the_busy_one() -> None:
        asyncio.run(_stop_the_busy_one(up))

    assert stream(up, "pair", stop_the_busy_one, **SAMPLED) == wanted
    (moved,) = up.log_events("gateway", "session.moved")
    assert moved["from_replica_id"] != moved["to_replica_id"]
    assert (moved["path"], moved["reason"], moved["why_not_shipped"]) == ("ship", "test", "")
    assert moved["shipped_bytes"] > 0
    assert moved["recomputed_tokens"] < moved["shipped_tokens"]
    assert up.log_events("gateway", "session.resumed") == []
    with up.client() as client:
        client.delete("pair")


async def _until_two_are_ready(up: StokerUp) -> None:
    async with connect(up.cluster.node_agent) as channel:
        while True:
            report = await NodeAgentStub(channel).GetReport(GetReportRequest())
            if sum(replica.state == REPLICA_STATE_READY for replica in report.replicas) == 2:
                return
            await asyncio.sleep(0.1)  # the workers need the processors


async def _stop_the_busy_one(up: StokerUp) -> None:
    fence = up.log_events("node_agent", "controller.joined")[-1]["fence"]
    async with connect(up.cluster.node_agent) as channel:
        stub = NodeAgentStub(channel)
        report = await stub.GetReport(GetReportRequest())
        (busy,) = [replica for replica in report.replicas if replica.running_sessions]
        order = StopReplicaRequest(replica_id=busy.replica_id, grace_seconds=60, reason="test", fence=fence)
        await stub.StopReplica(order)


# --- rebalancing ---

CROWD = 4
CROWD_TOKENS = 12_000
"""More than any machine makes before some of the streams have moved."""


def test_streams_above_the_concurrency_move_to_a_replica_that_has_room(up: StokerUp, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", context_tokens=CROWD_TOKENS + 100)
    spec = model_pb2.ModelSpec(
        name="crowd", checkpoint_uri=str(folder), keep_alive_seconds=-1, max_replicas=2, concurrency=2
    )
    with up.client() as client:
        client.deploy(spec)
    with ThreadPoolExecutor(CROWD) as pool, up.openai() as client:
        calm = [_text(client, seed, 60) for seed in range(CROWD)]
        reading = [
            pool.submit(_text, client, seed, CROWD_TOKENS, lambda: len(_moves_of_the_crowd(up)) >= 2)
            for seed in range(CROWD)
        ]
        seen = [each.result() for each in reading]
    with up.client() as client:
        client.delete("crowd")

    shifted = up.log_events("controller", "sessions.shifted")[0]
    assert (shifted["sessions"], shifted["reason"]) == (2, "crowded")
    assert {move["to_replica_id"] for move in _moves_of_the_crowd(up)} == {shifted["to_replica_id"]}
    assert up.log_events("gateway", "session.resumed") == []
    assert [text[: len(expected)] for text, expected in zip(seen, calm, strict=True)] == calm


def _text(
    client: OpenAI, seed: int, tokens: int, is_over: Callable[[], bool] = lambda: False, least: int = 120
) -> str:
    """Return what a sampled stream says, to its end or until it is over after so many tokens."""
    stream = client.completions.create(
        model="crowd", prompt="the", max_tokens=tokens, temperature=1.0, seed=seed, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    text = ""
    with stream:
        for number, chunk in enumerate(stream, 1):
            text += chunk.choices[0].text
            if number % least == 0 and is_over():
                break
    return text


def _moves_of_the_crowd(up: StokerUp) -> list[dict]:
    moves = up.log_events("gateway", "session.moved")
    return [move for move in moves if move["reason"].startswith("rebalanced")]


# --- tensor-parallel ranks ---


@pytest.fixture(scope="module")
def cut(up: StokerUp, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, cut for two ranks and deployed as `m`."""
    folder = tmp_path_factory.mktemp("cut") / "model"
    convert(tiny_model, folder, tensor_parallel=2)
    with up.client() as client:
        client.deploy(model_pb2.ModelSpec(name="m", checkpoint_uri=str(folder), keep_alive_seconds=-1))
    return folder


def text_of_the_whole_model(folder: Path) -> str:
    """What transformers generates greedily, in float32, from the model in one piece."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(prompt["input_ids"], max_new_tokens=TOKENS, do_sample=False)
    new = out[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def replicas(up: StokerUp) -> list[dict]:
    return json.loads(stoker("ps", "-o", "json", data_dir=up.data_dir).stdout)


def ranks(up: StokerUp) -> list[psutil.Process]:
    """The processes of the replica that started last, by rank."""
    by_rank = {
        line["holder"].rpartition(" ")[2]: line["peer_pid"] for line in up.log_events("store", "lease.began")
    }
    return [psutil.Process(by_rank[rank]) for rank in ("0", "1")]


def until(holds: Callable[[], bool]) -> None:
    """Ask until it holds, each time through a command that takes its time."""
    for _ in range(120):
        if holds():
            return
    raise AssertionError("it did not come to hold")


@pytest.mark.usefixtures("cut")
def test_a_cut_model_is_one_replica_on_two_devices_and_says_what_the_whole_model_says(
    up: StokerUp, tiny_model: Path
) -> None:
    assert stream(up) == text_of_the_whole_model(tiny_model)

    (replica,) = replicas(up)
    assert replica["devices"] == [0, 1]
    assert [process.is_running() for process in ranks(up)] == [True, True]
    assert replica["worker_pid"] == str(ranks(up)[0].pid)
    assert "ranks=2" in replica["numerics"]
    assert "0,1" in stoker("explain", "m", data_dir=up.data_dir).stdout


@pytest.mark.usefixtures("cut")
def test_a_killed_rank_ends_the_replica_and_its_stream_goes_on_with_a_new_one(up: StokerUp) -> None:
    """Not the first rank: what its end means is what any worker's does."""
    expected = stream(up)
    before = ranks(up)

    assert stream(up, "m", before[1].kill) == expected

    assert_all_ended(before)
    (replica,) = [each for each in replicas(up) if each["state"] == "REPLICA_STATE_READY"]
    assert replica["devices"] == [0, 1]


@pytest.mark.usefixtures("cut")
def test_a_session_whose_client_leaves_ends_on_all_ranks_and_others_go_on(up: StokerUp) -> None:
    expected = stream(up)

    with pytest.raises(InterruptedError):
        stream(up, "m", leave)
    until(lambda: replicas(up)[0]["running_sessions"] == 0)

    assert stream(up) == expected


def leave() -> None:
    """Stop reading in the middle."""
    raise InterruptedError


def test_a_model_of_ranks_goes_to_zero_and_stoker_down_leaves_no_rank(up: StokerUp, cut: Path) -> None:
    """Last of this file: it ends the cluster that the others share."""
    stream(up)
    before = ranks(up)
    with up.client() as client:
        client.deploy(model_pb2.ModelSpec(name="m", checkpoint_uri=str(cut), keep_alive_seconds=0))

    assert_all_ended(before, within_seconds=60)
    until(lambda: replicas(up) == [])
    stream(up)
    everything = up.everything()

    up.stop()

    assert_all_ended(everything)
    assert [path for path in up.data_dir.rglob("*") if path.is_socket() or path.suffix == ".meet"] == []

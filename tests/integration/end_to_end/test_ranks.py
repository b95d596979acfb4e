"""A checkpoint that is cut for two ranks, served by one replica on two devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from stoker.checkpoint.convert import convert
from stoker.v1 import model_pb2
from tests.integration.end_to_end.stoker_up import StokerUp, assert_all_ended, stoker, stoker_up

QUESTION = [{"role": "user", "content": "the quick brown fox"}]
TOKENS = 48
AFTER_CHUNKS = 4
"""Of a stream, something happens."""


@pytest.fixture(scope="module")
def cut(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, cut for two ranks."""
    folder = tmp_path_factory.mktemp("cut") / "model"
    convert(tiny_model, folder, tensor_parallel=2)
    return folder


@pytest.fixture(scope="module")
def up(cut: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StokerUp]:
    """A host of two devices on which the model is deployed."""
    with stoker_up(tmp_path_factory.mktemp("up"), "--devices", "2", "--pool", "0.125") as running:
        with running.client() as client:
            client.deploy(model_pb2.ModelSpec(name="m", checkpoint_uri=str(cut), keep_alive_seconds=-1))
        yield running


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


def stream(up: StokerUp, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Return the greedy text; call back in mid-stream."""
    text = ""
    with up.openai() as client:
        chunks = client.chat.completions.create(
            model="m",
            messages=QUESTION,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(chunks):
            if number == AFTER_CHUNKS:
                meanwhile()
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return text


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


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_replica_and_its_stream_goes_on_with_a_new_one(
    up: StokerUp, victim: int
) -> None:
    expected = stream(up)
    before = ranks(up)

    assert stream(up, before[victim].kill) == expected

    assert_all_ended(before)
    (replica,) = [each for each in replicas(up) if each["state"] == "REPLICA_STATE_READY"]
    assert replica["devices"] == [0, 1]


def test_a_session_whose_client_leaves_ends_on_all_ranks_and_others_go_on(up: StokerUp) -> None:
    expected = stream(up)

    with pytest.raises(InterruptedError):
        stream(up, leave)
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
    assert [path for path in up.data_dir.rglob("*") if path.is_socket() or path.suffix == ".store"] == []

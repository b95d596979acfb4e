"""Processes that die, folders and ports that are taken, signals: a clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stoker.v1 import model_pb2
from tests.integration.end_to_end.stoker_up import (
    StokerUp,
    assert_all_ended,
    assert_nothing_listens,
    stoker,
)

ROOT = Path(__file__).resolve().parents[3]
QUESTION = [{"role": "user", "content": "the quick brown fox"}]


def _deploy(up: StokerUp, folder: Path) -> None:
    with up.client() as client:
        client.deploy(model_pb2.ModelSpec(name="m", checkpoint_uri=str(folder), keep_alive_seconds=-1))


def _ask(up: StokerUp) -> str:
    with up.openai() as client:
        answer = client.chat.completions.create(model="m", messages=QUESTION, max_tokens=4, temperature=0)
        return answer.choices[0].message.content


def _worker_pids(up: StokerUp) -> list[int]:
    answer = stoker("ps", "-o", "json", data_dir=up.data_dir)
    return [int(replica["worker_pid"]) for replica in json.loads(answer.stdout)]


@pytest.mark.parametrize("service", ["controller", "gateway", "store"])
def test_a_killed_service_comes_back_and_the_running_replica_stays(
    up: StokerUp, tiny_model: Path, service: str
) -> None:
    _deploy(up, tiny_model)
    before = _ask(up)
    (worker,) = _worker_pids(up)
    victim = up.service(service)

    victim.kill()
    victim.wait(10)
    _until_answers(up, service)

    assert _ask(up) == before
    assert _worker_pids(up) == [worker]


def _until_answers(up: StokerUp, service: str) -> None:
    addresses = {
        "controller": up.cluster.controller,
        "gateway": up.cluster.gateway,
        "store": up.cluster.store,
        "node_agent": up.cluster.node_agent,
    }
    for _ in range(60):
        if stoker("health", addresses[service]).returncode == 0:
            return
    raise AssertionError(f"{service} did not come back")


def test_a_node_agent_is_killed_while_it_generates_and_the_client_sees_the_same_bytes(
    up: StokerUp, tiny_model: Path
) -> None:
    """Other victims: tests/integration/chaos."""
    _deploy(up, tiny_model)
    wanted = _stream(up)

    assert _stream(up, after_first=lambda: up.service("node_agent").kill()) == wanted
    _until_answers(up, "node_agent")
    _until_answers(up, "store")


def _stream(up: StokerUp, after_first: Callable[[], None] = lambda: None) -> list[object]:
    """Return all of three sampled answers with their log probabilities; call back after the first token."""
    seen: dict[int, list[object]] = {}
    usage = None
    with up.openai() as client:
        chunks = client.chat.completions.create(
            model="m",
            messages=QUESTION,
            max_tokens=60,
            n=3,
            seed=5,
            temperature=0.8,
            frequency_penalty=0.3,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(chunks):
            if number == 5:
                after_first()
            for choice in chunk.choices:
                scored = choice.logprobs.content if choice.logprobs else ()
                kept = seen.setdefault(choice.index, ["", [], None])
                kept[0] += choice.delta.content or ""
                kept[1] += [
                    (t.token, t.logprob, [(o.token, o.logprob) for o in t.top_logprobs]) for t in scored
                ]
                kept[2] = choice.finish_reason or kept[2]
            usage = chunk.usage or usage
    return [seen, usage.completion_tokens, usage.prompt_tokens]


def test_a_second_stoker_up_on_one_data_folder_is_refused(up: StokerUp) -> None:
    second = stoker("up", "--data", str(up.data_dir), "--port", "0", "--grpc-port", "0")

    assert second.returncode == 1
    assert f"pid {up.process.pid}" in second.stderr
    assert "--data" in second.stderr
    assert stoker("status", data_dir=up.data_dir).returncode == 0  # the first one lives on


def test_a_taken_port_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        answer = stoker("up", "--data", str(tmp_path / "data"), "--port", str(port))

    assert answer.returncode == 1
    assert f"127.0.0.1:{port}" in answer.stderr
    assert "--port" in answer.stderr


def test_a_detached_cluster_keeps_running_until_stoker_down(tmp_path: Path, tiny_model: Path) -> None:
    home = tmp_path / "data"
    up = stoker(
        "up", "--detach", "--port", "0", "--grpc-port", "0", "--pool", "0.5",
        "--deploy", f"m={tiny_model}", "--data", str(home),
    )  # fmt: skip
    try:
        assert up.returncode == 0, up.stderr
        assert "curl -N http://127.0.0.1:" in up.stdout
        answer = stoker("run", "m", "fox", "--max-tokens", "2", "--temperature", "0", data_dir=home)
        assert answer.returncode == 0, answer.stderr
    finally:
        down = stoker("down", "--data", str(home))
    assert down.returncode == 0, down.stderr
    again = stoker("down", "--data", str(home))
    assert again.returncode == 1
    assert "nothing runs" in again.stderr


def test_a_detached_cluster_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        answer = stoker("up", "--detach", "--data", str(tmp_path / "data"), "--port", str(port))

    assert answer.returncode == 1
    assert f"127.0.0.1:{port}" in answer.stderr


@pytest.mark.parametrize("after_line", ["starting gateway", "serving on", "from cold"])
def test_ctrl_c_at_any_time_of_the_demo_leaves_nothing(
    tmp_path: Path, tiny_model: Path, after_line: str
) -> None:
    """Run in a copy's worth of isolation: its data folder is the test's own."""
    demo = subprocess.Popen(
        [sys.executable, "examples/demo.py", "--source", str(tiny_model), "--data", str(tmp_path / "demo")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "STOKER_MODEL_CACHE": str(tmp_path / "models")},
    )  # fmt: skip
    assert demo.stdout is not None
    try:
        for line in demo.stdout:
            if after_line in line:
                break
        children = psutil.Process(demo.pid).children(recursive=True)

        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        demo.wait(60)
    finally:
        demo.kill()
        demo.stdout.close()

    assert demo.returncode == 130, rest
    assert "everything is stopped" in rest
    assert_all_ended(children)
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_sigterm_leaves_no_process_port_or_socket(up: StokerUp, tiny_model: Path) -> None:
    """Last of this file: it ends the cluster that the others share."""
    _deploy(up, tiny_model)
    _ask(up)
    everything = up.everything()
    assert len(everything) >= 7  # stoker up, four services, a fork server, a worker at least

    up.stop(signal.SIGTERM)

    assert_all_ended(everything)
    assert_nothing_listens(up.cluster)
    assert [path for path in up.data_dir.rglob("*") if path.is_socket()] == []
    assert not (up.data_dir / "up.json").exists()

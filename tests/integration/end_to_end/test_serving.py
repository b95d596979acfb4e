"""The whole path on real processes: cold, warm, together, and back to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from stoker.v1 import (
    checkpoint_store_pb2,
    checkpoint_store_pb2_grpc,
    controller_pb2,
    controller_pb2_grpc,
    model_pb2,
)
from tests.integration.end_to_end.stoker_up import (
    StokerUp,
    assert_all_ended,
    assert_nothing_listens,
    stoker,
)
from tests.integration.store.origin_server import origin_server
from tests.integration.tiny_adapter import make_tiny_adapter
from tests.integration.tiny_model import make_tiny_model

QUESTION = [{"role": "user", "content": "the quick brown fox"}]


def _deploy(up: StokerUp, name: str, folder: Path, **spec: float) -> None:
    with up.client() as client:
        client.deploy(model_pb2.ModelSpec(name=name, checkpoint_uri=str(folder), **spec))


def _until_no_replica(up: StokerUp, model: str) -> None:
    """Return when the controller tells gateways that the model is served nowhere."""
    with grpc.insecure_channel(up.cluster.controller) as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        for update in stub.WatchRoutes(controller_pb2.WatchRoutesRequest(gateway_id="test"), timeout=60):
            for route in update.routes:
                if route.model.spec.name == model and not route.replicas:
                    return


def test_a_cold_model_answers_and_the_request_tells_where_its_time_went(
    up: StokerUp, tiny_model: Path
) -> None:
    _deploy(up, "cold", tiny_model)

    with up.openai() as client:
        raw = client.chat.completions.with_raw_response.create(
            model="cold", messages=QUESTION, max_tokens=8, temperature=0
        )
        answer = raw.parse()

    assert answer.usage.completion_tokens in range(1, 9)
    trace = httpx.get(f"{up.cluster.rest_url}/api/v1/requests/{raw.headers['x-request-id']}").json()
    assert trace["start"]["total_seconds"] > 0
    assert sum(int(part["bytes"]) for part in trace["start"]["transfers"]) > 0
    assert trace["first_token_seconds"] >= trace["start"]["total_seconds"]


def test_ten_requests_for_one_cold_model_cause_one_load(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "ten", tiny_model, concurrency=16)

    def ask(_: int) -> str:
        with up.openai() as client:
            answer = client.chat.completions.create(
                model="ten", messages=QUESTION, max_tokens=6, temperature=0, seed=1
            )
            return answer.choices[0].message.content

    with ThreadPoolExecutor(10) as threads:
        texts = set(threads.map(ask, range(10)))

    assert len(texts) == 1
    placed = [line for line in up.log_events("controller", "replica.placed") if line["model"] == "ten"]
    assert len(placed) == 1


def test_streamed_and_whole_answers_are_the_same_text(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "same", tiny_model)
    options = {"model": "same", "messages": QUESTION, "max_tokens": 24, "temperature": 0.9, "seed": 7}

    with up.openai() as client:
        whole = client.chat.completions.create(**options).choices[0].message.content
        chunks = list(client.chat.completions.create(**options, stream=True))

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole


def test_a_model_larger_than_the_pool_answers_as_transformers_does_and_leaves_the_pool_free(
    up: StokerUp, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path / "large", hidden=1024)
    file_bytes = (folder / "model.safetensors").stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = AutoModelForCausalLM.from_pretrained(folder).generate(
        **prompt, max_new_tokens=8, do_sample=False
    )
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    _deploy(up, "large", folder)

    with up.openai() as client:
        answer = client.chat.completions.create(model="large", messages=QUESTION, max_tokens=8, temperature=0)

    assert answer.choices[0].message.content == expected
    with grpc.insecure_channel(up.cluster.store) as channel:
        store = checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)
        for status in store.WatchStatus(checkpoint_store_pb2.GetStatusRequest(), timeout=60):
            held = [each for each in status.checkpoints if each.checkpoint.uri == str(folder)]
            if held and not held[0].leases:
                break
    assert held[0].dram_bytes == 0
    assert 0 < status.pool.window_bytes < status.pool.total_bytes < file_bytes


def test_a_client_that_leaves_does_not_abort_the_load(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "left", tiny_model)
    body = {"model": "left", "messages": QUESTION, "stream": True, "max_tokens": 4}

    with httpx.stream("POST", f"{up.cluster.rest_url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200  # headers come before the model is there

    with up.openai() as client:
        client.chat.completions.create(model="left", messages=QUESTION, max_tokens=2)
    placed = [line for line in up.log_events("controller", "replica.placed") if line["model"] == "left"]
    assert len(placed) == 1


def test_an_unused_model_goes_back_to_zero_and_comes_again(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "zero", tiny_model, keep_alive_seconds=0.2)

    with up.openai() as client:
        first = client.chat.completions.create(model="zero", messages=QUESTION, max_tokens=4, temperature=0)
        _until_no_replica(up, "zero")
        again = client.chat.completions.create(model="zero", messages=QUESTION, max_tokens=4, temperature=0)

    assert again.choices[0].message.content == first.choices[0].message.content


def test_an_unknown_model_is_a_404_that_suggests_a_near_name(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "nearby", tiny_model)

    with up.openai() as client, pytest.raises(openai.NotFoundError, match="nearby") as caught:
        client.chat.completions.create(model="nearbi", messages=QUESTION)

    assert caught.value.code == "model_not_found"


def test_a_prompt_beyond_the_context_is_a_400(up: StokerUp, tiny_model: Path) -> None:
    _deploy(up, "short", tiny_model)

    with up.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="short", prompt="fox " * 2000, max_tokens=4)

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: _truncate(folder / "model.safetensors"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4096), "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: _architecture(folder, "NobodyForCausalLM"), "NobodyForCausalLM"),
    ],
    ids=["missing shard", "truncated shard", "hostile header", "no config", "unsupported architecture"],
)
def test_a_bad_checkpoint_is_refused_when_it_is_deployed(
    up: StokerUp, tiny_model: Path, tmp_path: Path, damage: object, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)  # type: ignore[operator]

    answer = stoker("deploy", "bad", str(folder), "--controller", up.cluster.controller)

    assert answer.returncode == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _architecture(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))


def test_the_command_line_shows_what_runs(up: StokerUp, tiny_model: Path) -> None:
    home = up.data_dir
    deployed = stoker("deploy", "cli", str(tiny_model), "--wait", data_dir=home)
    asked = stoker("run", "cli", "the lazy dog", "--max-tokens", "4", "-o", "json", data_dir=home)
    replicas = json.loads(stoker("ps", "cli", "-o", "json", data_dir=home).stdout)
    models = json.loads(stoker("ls", "-o", "json", data_dir=home).stdout)
    status = json.loads(stoker("status", "-o", "json", data_dir=home).stdout)
    logged = stoker("logs", "cli", data_dir=home)
    removed = stoker("rm", "cli", data_dir=home)

    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(asked.stdout)["completion_tokens"] in range(1, 5)
    assert [replica["state"] for replica in replicas] == ["REPLICA_STATE_READY"]
    assert "cli" in {model["spec"]["name"] for model in models}
    assert status["cluster"]["leading"] is True
    assert "service.started" in logged.stdout
    assert removed.returncode == 0, removed.stderr
    assert stoker("run", "cli", "x", data_dir=home).returncode == 1


@pytest.fixture
def poet_elsewhere(tmp_path: Path) -> Iterator[str]:
    """The url of the same adapter as `poet` of the test below."""
    with origin_server(make_tiny_adapter(tmp_path / "elsewhere", seed=0)) as server:
        yield server.url


def test_adapters_near_and_far_are_chosen_per_request_on_one_replica(
    up: StokerUp, tiny_model: Path, tmp_path: Path, poet_elsewhere: str
) -> None:
    poet, coder = (
        make_tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("poet", "coder"))
    )
    names = ["lora", "lora:coder", "lora:poet", "lora:far"]
    deployed = stoker(
        *("deploy", "lora", str(tiny_model), "--adapter", f"poet={poet}", "--adapter", f"coder={coder}"),
        *("--adapter", f"far={poet_elsewhere}"),
        data_dir=up.data_dir,
    )
    assert deployed.returncode == 0, deployed.stderr
    assert "lora:poet" in deployed.stdout

    def ask(name: str) -> str:
        with up.openai() as client:
            answer = client.chat.completions.create(
                model=name, messages=QUESTION, max_tokens=12, temperature=0, seed=1
            )
            assert answer.model == name
            return answer.choices[0].message.content

    alone = {name: ask(name) for name in names}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(ask, names * 2))
    with up.client() as client:  # another set of adapters, the same replica
        adapters = [model_pb2.AdapterSpec(name="poet", uri=str(poet))]
        client.deploy(model_pb2.ModelSpec(name="lora", checkpoint_uri=str(tiny_model), adapters=adapters))
        by_grpc = "".join(
            event.text
            for event in client.chat(
                "lora:poet", [("user", QUESTION[0]["content"])], max_tokens=12, temperature=0
            )
        )

    assert len(set(alone.values())) == len(names) - 1
    assert alone["lora:far"] == alone["lora:poet"]
    assert together == [alone[name] for name in names] * 2
    assert by_grpc == alone["lora:poet"]
    with up.openai() as client:
        assert {model.id for model in client.models.list()} >= {"lora", "lora:poet"}
        with pytest.raises(openai.NotFoundError, match="lora:poet") as unknown:
            client.chat.completions.create(model="lora:poem", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    placed = [line for line in up.log_events("controller", "replica.placed") if line["model"] == "lora"]
    assert len(placed) == 1


def test_an_adapter_for_another_model_is_refused_when_it_is_deployed(
    up: StokerUp, tiny_model: Path, tmp_path: Path
) -> None:
    wrong = make_tiny_adapter(tmp_path / "wrong", seed=1, hidden=32)

    refused = stoker("deploy", "misfit", str(tiny_model), "--adapter", f"x={wrong}", data_dir=up.data_dir)

    assert refused.returncode != 0
    assert "is no adapter for" in refused.stderr


def test_even_sigkill_of_stoker_up_leaves_no_process(up: StokerUp, tiny_model: Path) -> None:
    """Last of this file: it ends the cluster that the others share."""
    _deploy(up, "last", tiny_model)
    with up.openai() as client:
        client.completions.create(model="last", prompt="the", max_tokens=2)
    everything = up.everything()

    up.process.kill()
    up.process.wait(10)

    assert_all_ended(everything, within_seconds=60)
    assert_nothing_listens(up.cluster)

"""LoRA adapters in the engine: what a session with one computes, and what it leaves alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from services.worker.engine.adapted_rows import AdapterWeights
from services.worker.engine.protocol import EngineLimits, ResumeMode
from services.worker.engine.takeover import common_tokens
from services.worker.engine.transformers_engine import TransformersEngine
from stoker.models.lora import LoraWeights
from tests.unit.services.worker.tiny_models import VOCAB, ids, numbers, reference, request, run, served

SUFFIXES = ("q_proj", "v_proj", "down_proj", "c_attn", "c_proj")


def adapter_for(model: torch.nn.Module, name: str, *, seed: int, rank: int = 5) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, like: torch.Tensor) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(like.dtype)

    modules = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in SUFFIXES:
            weight = module.weight
            out, inner = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
            modules[path] = LoraWeights(
                a_RI=matrix(rank, inner, like=weight), b_OR=matrix(out, rank, like=weight), scale=0.5
            )
    return AdapterWeights(name=name, uri=f"/{name}", revision="1", modules=modules)


def merged(name: str, adapter: AdapterWeights) -> torch.nn.Module:
    """The oracle: a base whose weights have the change added, W + scale · B A."""
    model = reference(name)
    with torch.no_grad():
        for path, weights in adapter.modules.items():
            change = weights.scale * weights.b_OR @ weights.a_RI
            module = model.get_submodule(path)
            module.weight += change if isinstance(module, torch.nn.Linear) else change.t()
    return model


def mixed_requests(adapters: list[AdapterWeights | None], count: int = 8):
    rng = random.Random(3)
    found = []
    for i in range(count):
        wanted = request(
            f"s{i}",
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, 70))],
            max_tokens=rng.randint(3, 12),
            temperature=rng.choice([0.0, 0.9]),
            seed=i,
            top_logprobs=2,
        )
        found.append((wanted, adapters[i % len(adapters)]))
    return found


def with_adapter(wanted, adapter):
    return replace(wanted, adapter=adapter)


@pytest.fixture
def fresh_engine(models):
    def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> TransformersEngine:
        return TransformersEngine(models(name, dtype), EngineLimits(prefill_chunk_tokens=32))

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_gives_the_tokens_of_merged_weights(name, fresh_engine, models) -> None:
    adapter = adapter_for(models(name), "a", seed=1)
    prompt = list(range(3, 50))
    oracle = TransformersEngine(served(merged(name, adapter)), EngineLimits(prefill_chunk_tokens=32))
    plain = request("plain", prompt, max_tokens=10, top_logprobs=0)

    wanted = run(oracle, [plain])[0]["plain"]
    got = run(fresh_engine(name), [with_adapter(plain, adapter)])[0]["plain"]
    base = run(fresh_engine(name), [plain])[0]["plain"]

    assert ids(got) == ids(wanted)
    torch.testing.assert_close(
        torch.tensor([out.logprob for out in got]),
        torch.tensor([out.logprob for out in wanted]),
        rtol=1e-3,
        atol=1e-3,
    )
    assert ids(base) != ids(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama_aligned", "llama_odd", "gpt2"])
def test_every_session_has_its_bits_whatever_adapters_are_in_the_batch(
    name, dtype, fresh_engine, models
) -> None:
    base = models(name, dtype)
    adapters = [None, adapter_for(base, "a", seed=1), adapter_for(base, "b", seed=2, rank=16)]
    requests = [with_adapter(*pair) for pair in mixed_requests(adapters)]
    alone = {r.session_id: numbers(run(fresh_engine(name, dtype), [r])[0][r.session_id]) for r in requests}
    rng = random.Random(6)
    rng.shuffle(requests)

    mixed, _ = run(fresh_engine(name, dtype), requests, arrivals=lambda _: rng.random() < 0.5)

    assert {session: numbers(outs) for session, outs in mixed.items()} == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_resume_with_the_same_adapter_gives_bitwise_the_remaining_tokens(
    dtype, fresh_engine, models
) -> None:
    adapter = adapter_for(models("llama_aligned", dtype), "a", seed=1)
    original = with_adapter(request("s", range(40), max_tokens=14, temperature=0.8, seed=5), adapter)
    whole = numbers(run(fresh_engine("llama_aligned", dtype), [original])[0]["s"])
    resumed = [
        replace(original, session_id=f"at{k}", generated_token_ids=[row[1] for row in whole[:k]])
        for k in (1, 6, 13)
    ]
    others = [request("base", range(9), max_tokens=9)]

    tokens, _ = run(fresh_engine("llama_aligned", dtype), [*resumed, *others])

    assert [numbers(tokens[f"at{k}"]) for k in (1, 6, 13)] == [whole[k:] for k in (1, 6, 13)]


def test_a_snapshot_keeps_the_adapter(fresh_engine, models) -> None:
    adapter = adapter_for(models("llama"), "a", seed=1)
    wanted = with_adapter(request("s", range(40), max_tokens=12), adapter)
    whole = numbers(run(fresh_engine(), [wanted])[0]["s"])
    source = fresh_engine()
    source.submit(wanted)
    emitted = []
    while len(emitted) < 5:
        emitted += source.step()
    target = fresh_engine()

    target.resume(source.snapshot("s", with_kv=True), ResumeMode.EXACT)

    assert numbers(run(target)[0]["s"]) == whole[len(emitted) :]


def test_keys_of_another_adapter_are_not_taken_over(fresh_engine, models) -> None:
    one, other = (adapter_for(models("llama"), name, seed=1) for name in "ab")
    source = fresh_engine()
    source.submit(with_adapter(request("s", range(40), max_tokens=12), one))
    source.step()
    source.step()
    earlier = source.snapshot("s")
    later = request("s", range(40), max_tokens=12)

    assert common_tokens(with_adapter(later, one), earlier) == 40
    assert common_tokens(with_adapter(later, other), earlier) == 0
    assert common_tokens(later, earlier) == 0

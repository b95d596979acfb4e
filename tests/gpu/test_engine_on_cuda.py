"""The engine on a CUDA device: the tokens of `generate`, the same bits alone and in a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from services.worker.engine.protocol import EngineLimits, Sampling, Submit, TokenOut
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.model_loading import build_skeleton
from stoker.ids import SessionId
from stoker.models.weights import assign_weights
from tests.integration.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21]]
TOKENS = 16


def _engine(folder: Path) -> TransformersEngine:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors", device="cuda")
    config = json.loads((folder / "config.json").read_text())
    model = assign_weights(build_skeleton(config, device=torch.device("cuda")), weights)
    return TransformersEngine(model, EngineLimits(max_context_tokens=256, max_kv_tokens=1024))


def _run(engine: TransformersEngine, prompts: list[list[int]]) -> list[list[tuple[int, float | None]]]:
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True, top_logprobs=0)
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(session_id=SessionId(str(index)), prompt_token_ids=prompt, sampling=sampling))
    made: list[list[tuple[int, float | None]]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            if isinstance(output, TokenOut):
                made[int(output.session_id)].append((output.token_id, output.logprob))
    return made


def test_greedy_tokens_are_those_of_generate(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(folder).to("cuda")
    prompt = torch.tensor([PROMPTS[0]], device="cuda")
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
    )[0, len(PROMPTS[0]) :].tolist()

    made = _run(_engine(folder), [PROMPTS[0]])

    assert [token for token, _ in made[0]] == expected


def test_a_session_has_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    engine = _engine(make_tiny_model(tmp_path / "model"))

    together = _run(engine, PROMPTS)
    alone = [_run(engine, [prompt])[0] for prompt in PROMPTS]

    assert together == alone

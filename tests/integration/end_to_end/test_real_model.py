"""The real chat model over REST: the very tokens that transformers' own `generate` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.v1 import model_pb2
from tests.integration.end_to_end.stoker_up import StokerUp, stoker_up

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 12


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StokerUp]:
    """A cluster whose pool holds the model whole."""
    with stoker_up(tmp_path_factory.mktemp("up")) as running:
        yield running


@pytest.mark.model
def test_a_greedy_answer_is_what_generate_gives(up: StokerUp, real_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reference = AutoModelForCausalLM.from_pretrained(real_model)
    output = reference.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with up.client() as client:
        client.deploy(model_pb2.ModelSpec(name="real", checkpoint_uri=str(real_model)))

    with up.openai() as client:
        answer = client.chat.completions.create(
            model="real", messages=QUESTION, max_tokens=TOKENS, temperature=0
        )

    assert answer.choices[0].message.content == expected
    assert "Paris" in expected
    assert answer.usage.prompt_tokens == prompt["input_ids"].shape[1]

from __future__ import annotations

import pytest
import torch
import transformers

import stoker.transformers
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.loader.drop_in_plan import Ours, Theirs, plan_call
from tests.unit.loader.tiny_models import CONFIGS, logits, tiny_model, token_ids


@pytest.mark.parametrize("name", CONFIGS)
def test_the_drop_in_returns_what_transformers_returns(tmp_path, name) -> None:
    tiny_model(name, torch.bfloat16).save_pretrained(tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    found = stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(found) is type(wanted)
    assert found.dtype == wanted.dtype
    assert torch.equal(logits(found), logits(wanted))
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.name_or_path == wanted.name_or_path
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    tokens = [m.generate(token_ids(), max_new_tokens=4, do_sample=False) for m in (found, wanted)]
    assert torch.equal(*tokens)


def test_a_model_from_the_drop_in_saves_trains_and_ties(tmp_path) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path / "a")
    found = stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")

    found(token_ids(), labels=token_ids()).loss.backward()
    with torch.no_grad():
        found.model.embed_tokens.weight.add_(0.5)
    found.save_pretrained(tmp_path / "b")

    assert found.lm_head.weight.grad is not None
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again), logits(found))


@pytest.mark.parametrize(
    "arguments",
    [
        {"torch_dtype": torch.float16},
        {"dtype": "bfloat16"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True, "use_safetensors": True},
        {"attn_implementation": "eager"},
        {"trust_remote_code": False, "revision": "main"},
    ],
)
def test_common_arguments_mean_what_they_mean_to_transformers(tmp_path, arguments) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)

    found = stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)

    assert found.dtype == wanted.dtype
    assert found.config._attn_implementation == wanted.config._attn_implementation
    assert torch.equal(logits(found), logits(wanted))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"device_map": "auto"}, "device_map"),
        ({"use_safetensors": False}, "use_safetensors"),
        ({"dtype": {"": "float16"}}, "dtype"),
        ({"variant": "fp16"}, "variant"),
    ],
)
def test_what_only_transformers_knows_is_left_to_it_with_its_reason(arguments, reason) -> None:
    plan = plan_call(arguments)

    assert isinstance(plan, Theirs)
    assert reason in plan.reason


def test_arguments_that_are_none_are_as_good_as_absent() -> None:
    assert plan_call({"quantization_config": None, "dtype": None}) == Ours(
        device=None, dtype=None, attn_implementation=None, config=None, hub={}
    )


def test_handing_on_warns_and_works(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)

    with pytest.warns(UserWarning, match="because of use_cache"):
        found = stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=False)

    assert found.config.use_cache is False


def test_another_head_than_the_saved_one_is_left_to_transformers(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)

    with pytest.warns(UserWarning, match="weights may be missing"):
        found = stoker.transformers.AutoModel.from_pretrained(tmp_path)

    assert type(found) is transformers.LlamaModel


def test_the_checkpoints_own_code_is_never_run(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="never runs code"):
        stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_damaged_checkpoint_is_not_handed_on(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)

    with pytest.raises(CheckpointInvalid, match="header"):
        stoker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_every_other_name_is_transformers_own() -> None:
    assert stoker.transformers.AutoTokenizer is transformers.AutoTokenizer
    assert stoker.transformers.LlamaConfig is transformers.LlamaConfig
    assert issubclass(stoker.transformers.AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    with pytest.raises(AttributeError):
        stoker.transformers.Nonsense  # noqa: B018 - the look-up is the test

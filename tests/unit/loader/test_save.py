from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import stoker
from stoker.checkpoint.index import open_checkpoint
from stoker.checkpoint.verify import verify
from stoker.errors import AlreadyExists, CheckpointInvalid, InvalidRequest
from tests.unit.loader.tiny_models import CONFIGS, logits, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_is_loaded_by_us_and_by_transformers(tmp_path, name) -> None:
    model = tiny_model(name)

    index = stoker.save_model(model, tmp_path / "m")

    assert index.layout == "converted"
    assert verify(tmp_path / "m").ok
    assert torch.equal(logits(stoker.load_model(tmp_path / "m", daemon=None)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))


def test_a_model_is_saved_in_the_dtype_that_it_has(tmp_path) -> None:
    stoker.save_model(tiny_model("llama", torch.bfloat16), tmp_path / "m")

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_tied_weights_are_stored_once(tmp_path) -> None:
    index = stoker.save_model(tiny_model("llama_tied"), tmp_path / "m")

    assert index.tied_groups == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_tensors_by_name_are_saved_and_loaded(tmp_path) -> None:
    wanted = {"a": torch.randn(3, 5).t(), "b.weight": torch.arange(4)}

    stoker.save_model(wanted, tmp_path / "m")

    found = stoker.load_tensors(tmp_path / "m", daemon=None)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(CheckpointInvalid, match="model_type"):
        stoker.load_model(tmp_path / "m", daemon=None)


def test_nothing_but_a_checkpoint_is_replaced_and_that_only_when_asked(tmp_path) -> None:
    stoker.save_model({"a": torch.zeros(1)}, tmp_path / "m")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")

    with pytest.raises(AlreadyExists):
        stoker.save_model({"a": torch.ones(1)}, tmp_path / "m")
    with pytest.raises(AlreadyExists):
        stoker.save_model({"a": torch.ones(1)}, tmp_path / "other", overwrite=True)
    stoker.save_model({"a": torch.ones(1)}, tmp_path / "m", overwrite=True)
    assert stoker.load_tensors(tmp_path / "m", daemon=None)["a"].item() == 1
    assert open_checkpoint(tmp_path / "m").tensors[0].name == "a"


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"a": 3},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.eye(3).to_sparse()},
        torch.nn.Linear(2, 2),
    ],
)
def test_what_has_no_data_to_store_is_refused(tmp_path, wrong) -> None:
    with pytest.raises(InvalidRequest):
        stoker.save_model(wrong, tmp_path / "m")
    assert not (tmp_path / "m").exists()

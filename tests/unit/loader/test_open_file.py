from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

import stoker
from stoker.errors import InvalidRequest, NotFound
from tests.unit.loader.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama_tied").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_an_open_checkpoint_gives_what_safe_open_gives(folder) -> None:
    with (
        safe_open(folder / "model.safetensors", "pt") as wanted,
        stoker.open(folder, daemon=None) as found,
    ):
        assert sorted(found.keys()) == sorted(wanted.keys())
        assert found.metadata() == wanted.metadata()
        for name in wanted.keys():  # noqa: SIM118 - safe_open is not iterable
            assert torch.equal(found.get_tensor(name), wanted.get_tensor(name))
        ours, theirs = (each.get_slice("model.embed_tokens.weight") for each in (found, wanted))
        assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
        assert torch.equal(ours[3:9, ::2], theirs[3:9, ::2])


def test_names_come_in_execution_order_and_tied_ones_work(tmp_path) -> None:
    stoker.save_model(tiny_model("llama_tied"), tmp_path / "saved")

    with stoker.open(tmp_path / "saved", daemon=None) as found:
        assert found.keys()[0] == "model.embed_tokens.weight"
        assert found.keys()[-1] == "lm_head.weight"
        head, embedding = (found.get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        assert head.data_ptr() == embedding.data_ptr()


def test_a_name_that_is_not_there_is_refused(folder) -> None:
    with stoker.open(folder, daemon=None) as found, pytest.raises(NotFound, match=r"no tensor 'nothing'"):
        found.get_tensor("nothing")


def test_a_name_that_is_nearly_there_is_refused_with_what_it_may_have_been(folder) -> None:
    with stoker.open(folder, daemon=None) as found, pytest.raises(NotFound, match=r"near ones.*norm\.weight"):
        found.get_tensor("model.norm")


def test_tensors_stay_when_the_checkpoint_is_closed(folder) -> None:
    with stoker.open(folder, daemon=None) as found:
        tensor = found.get_tensor("model.norm.weight")
        wanted = tensor.clone()

    assert torch.equal(tensor, wanted)
    with pytest.raises(InvalidRequest, match="closed"):
        found.keys()

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from stoker.checkpoint.convert import convert
from stoker.checkpoint.cuts import Cut
from stoker.checkpoint.index import open_checkpoint
from stoker.checkpoint.verify import verify
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.models.tensor_parallel import (
    COLWISE,
    EMBEDDINGS,
    PACKED,
    ROWWISE,
    WHOLE,
    cut_of,
    plan_cuts,
    style_of,
)
from tests.unit.loader.tiny_models import tiny_model

KNOWN = sorted(COLWISE | ROWWISE | PACKED | EMBEDDINGS)


class _Placed(Exception):
    """Carries the placement that transformers chose."""


def placement_of(style: str, parameter: str, shape: tuple[int, ...], monkeypatch):
    """What transformers' style would do to a parameter; None where it leaves it whole."""

    def caught(_tensor, _mesh, placements, **_):
        raise _Placed(placements[0])

    monkeypatch.setattr("transformers.distributed.tensor_parallel.distribute_tensor", caught)
    module = nn.Module()
    module._parameters[parameter] = nn.Parameter(torch.empty(shape, device="meta"))
    try:
        ALL_PARALLEL_STYLES[style].shard_param(module, parameter, None)
    except _Placed as placed:
        found = placed.args[0]
        return None if found.is_replicate() else found
    return None


STYLES_AND_SHAPES = [
    (style, shape)
    for style in [*KNOWN, *sorted(WHOLE)]
    for shape in [(8,), (8, 12), (2, 8, 12)]
    if style not in EMBEDDINGS or len(shape) > 1  # embeddings have two dimensions
]


@pytest.mark.parametrize(("style", "shape"), STYLES_AND_SHAPES)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_every_style_cuts_as_transformers_does(style, parameter, shape, monkeypatch) -> None:
    wanted = placement_of(style, parameter, shape, monkeypatch)

    cut = cut_of(style, f"layer.{parameter}", len(shape))

    if wanted is None:
        assert cut is None
    else:
        assert cut == Cut(dim=wanted.dim % len(shape), blocks=getattr(wanted, "split_factor", 1))


def test_a_style_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'sideways'"):
        cut_of("sideways", "layer.weight", 2)


def test_layers_are_matched_by_any_number() -> None:
    plan = {"model.layers.*.q_proj": "colwise", "model.layers.*.experts.w1": "rowwise"}

    assert style_of("model.layers.17.q_proj.weight", plan) == "colwise"
    assert style_of("model.layers.17.experts.w1", plan) == "rowwise"
    assert style_of("model.norm.weight", plan) is None


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gemma2", "phi3"])
def test_the_pieces_of_all_ranks_are_the_whole_model(tmp_path, name) -> None:
    model = tiny_model(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")

    index = convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2)

    assert (index.rank, index.ranks) == (0, 2)
    assert verify(tmp_path / "cut").ok
    ranks = [open_checkpoint(tmp_path / "cut", rank=rank) for rank in range(2)]
    assert ranks[0].revision == ranks[1].revision
    with (
        safe_open(ranks[0].files[0].path, "pt") as first,
        safe_open(ranks[1].files[0].path, "pt") as second,
        safe_open(tmp_path / "hf" / "model.safetensors", "pt") as wanted,
    ):
        for tensor in wanted.keys():  # noqa: SIM118 - safe_open is not iterable
            one, other = first.get_tensor(tensor), second.get_tensor(tensor)
            if cut := index.cuts.get(tensor):
                assert torch.equal(torch.cat([one, other], cut.dim), wanted.get_tensor(tensor))
            else:
                assert torch.equal(one, wanted.get_tensor(tensor))
                assert torch.equal(other, wanted.get_tensor(tensor))


def test_the_cut_goes_with_a_cast_and_is_not_done_twice(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "hf")

    index = convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2, dtype="bfloat16")

    assert index.dtype == "BF16"
    assert convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2, dtype="bfloat16") == index


def test_a_cut_checkpoint_is_no_whole_one(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2)

    with pytest.raises(CheckpointInvalid, match="cut for 2 tensor-parallel ranks"):
        open_checkpoint(tmp_path / "cut")
    with pytest.raises(InvalidRequest, match="no rank 2"):
        open_checkpoint(tmp_path / "cut", rank=2)


@pytest.mark.parametrize(
    ("name", "changes", "ranks", "says"),
    [
        ("llama", {}, 4, r"num_key_value_heads is 2.*possible are 2\."),
        ("llama", {"vocab_size": 97}, 2, r"embed_tokens.*97.*no other number"),
        ("gpt2", {}, 2, "no tp_plan"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(name, changes, ranks, says) -> None:
    model = tiny_model(name, **changes)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    with pytest.raises(InvalidRequest, match=says):
        plan_cuts(json.dumps(config).encode(), shapes, ranks=ranks, where="it")


def test_tensors_that_transformers_converts_are_refused() -> None:
    model = tiny_model("llama")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}

    with pytest.raises(InvalidRequest, match="experts"):
        plan_cuts(json.dumps(config).encode(), {"model.experts.0.w1": (4, 4)}, ranks=2, where="it")

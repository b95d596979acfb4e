"""A model's adapters as they are deployed."""

from __future__ import annotations

import pytest

from services.controller.adapters import MAX_ADAPTERS, check_adapters, described
from services.controller.wire import runtime_of
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.v1.model_pb2 import AdapterSpec, CheckpointInfo, ModelSpec


def spec(*names: str, uri: str = "/adapters/x") -> ModelSpec:
    return ModelSpec(name="base", adapters=[AdapterSpec(name=name, uri=uri) for name in names])


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (spec("a:b"), "adapter name 'a:b'"),
        (spec(""), "adapter name ''"),
        (spec("a", "a"), "named twice"),
        (spec("a", uri=""), "must name a folder"),
        (spec(*(f"a{i}" for i in range(MAX_ADAPTERS + 1))), "at most 256"),
    ],
)
def test_adapters_that_cannot_be_told_apart_or_found_are_refused(wrong, what) -> None:
    with pytest.raises(InvalidRequest, match=what) as refusal:
        check_adapters(wrong)

    assert refusal.value.param == "adapters"


async def test_what_a_store_says_takes_the_place_of_what_the_owner_said() -> None:
    asked = spec("b", "a")
    asked.adapters[0].revision = "made up"

    async def ask(uri: str) -> AdapterSpec:
        return AdapterSpec(uri=f"/real{uri}", revision="r1", rank=8)

    full = await described(asked, ask)

    assert [(one.name, one.uri, one.revision, one.rank) for one in full.adapters] == [
        ("a", "/real/adapters/x", "r1", 8),
        ("b", "/real/adapters/x", "r1", 8),
    ]


async def test_an_adapter_that_does_not_fit_refuses_the_deployment() -> None:
    async def ask(uri: str) -> AdapterSpec:
        raise CheckpointInvalid(f"{uri} is no adapter for this")

    with pytest.raises(CheckpointInvalid):
        await described(spec("a"), ask)


def test_adapters_are_no_part_of_what_a_running_replica_cannot_change() -> None:
    checkpoint = CheckpointInfo(uri="/m", revision="1")

    assert runtime_of(spec("a"), checkpoint) == runtime_of(spec(), checkpoint)

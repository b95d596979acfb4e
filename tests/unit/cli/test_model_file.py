"""`models.yaml`: what it says becomes specs; the rest is refused with line, field and advice."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.controller import specs
from services.controller.settings import ControllerSettings
from stoker.cli.apply import Change, lines, plan
from stoker.cli.model_file import AdapterEntry, ModelEntry, parse_models, schema_text
from stoker.cli.models import SCHEMA_PATH
from stoker.errors import InvalidRequest
from stoker.v1 import model_pb2

FOLDER = Path("/etc/stoker")


def specs_of(text: str) -> dict[str, model_pb2.ModelSpec]:
    return {found.spec.name: found.spec for found in parse_models(text, "models.yaml", FOLDER)}


def refusal_of(text: str) -> str:
    with pytest.raises(InvalidRequest) as refused:
        parse_models(text, "models.yaml", FOLDER)
    return refused.value.message


def a_model(lines_below: str = "") -> str:
    return f"models:\n  - name: chat\n    checkpoint_uri: /m/chat\n{lines_below}"


def a_deployed(name: str = "chat", **fields: object) -> model_pb2.Model:
    spec = model_pb2.ModelSpec(name=name, checkpoint_uri="/m", **fields)  # type: ignore[arg-type]
    return model_pb2.Model(spec=spec, checkpoint=model_pb2.CheckpointInfo(revision="r1"))


def test_a_models_own_value_stands_before_the_default() -> None:
    found = specs_of(
        "defaults: {concurrency: 4, keep_alive_seconds: 60, labels: {team: a}}\n"
        "models:\n"
        "  - {name: one, checkpoint_uri: /m/one}\n"
        "  - {name: two, checkpoint_uri: /m/two, concurrency: 2, labels: {tier: b}}\n"
    )

    assert (found["one"].concurrency, found["two"].concurrency) == (4, 2)
    assert (found["one"].keep_alive_seconds, dict(found["two"].labels)) == (60, {"tier": "b"})


def test_paths_are_relative_to_the_file_and_uris_are_left_alone() -> None:
    found = specs_of(
        "models:\n  - {name: a, checkpoint_uri: weights/a}\n  - {name: b, checkpoint_uri: 'hf://org/b'}\n"
    )

    assert (found["a"].checkpoint_uri, found["b"].checkpoint_uri) == ("/etc/stoker/weights/a", "hf://org/b")


def test_every_field_of_a_spec_can_be_said() -> None:
    fields = {field.name for field in model_pb2.ModelSpec.DESCRIPTOR.fields}

    assert set(ModelEntry.model_fields) == fields
    assert set(AdapterEntry.model_fields) <= set(model_pb2.AdapterSpec.DESCRIPTOR.fields_by_name)


def test_the_file_takes_what_the_controller_takes() -> None:
    schema = ModelEntry.model_json_schema()["properties"]
    settings = ControllerSettings(state="embedded://:memory:")

    assert tuple(schema["dtype"]["anyOf"][0]["enum"]) == specs.DTYPES
    assert tuple(schema["resume"]["anyOf"][0]["enum"]) == specs.RESUMES
    for spec in specs_of(a_model("    max_queue: 100000\n    concurrency: 4096\n")).values():
        specs.resolve(spec, settings)


def test_the_shipped_schema_is_the_one_that_is_checked_against() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (a_model("    keep_alive: 5\n"), "yaml:4: models[0].keep_alive: unknown key; did you mean keep_"),
        (a_model("    max: 5\n"), "did you mean max_context_tokens or max_queue or max_replicas?"),
        ("modles: []\n", "models.yaml:1: modles: unknown key; did you mean models?"),
        ("defaults: {name: x}\n" + a_model(), "models.yaml:1: defaults.name: unknown key; known are"),
        ("models:\n  - name: chat\n", "models.yaml:2: models[0].checkpoint_uri: this is missing"),
        (a_model("    concurrency: many\n"), "yaml:4: models[0].concurrency: 'many' should be a valid int"),
        (a_model("    concurrency: 0\n"), "yaml:4: models[0].concurrency: 0 should be greater"),
        (a_model("    dtype: float13\n"), "models[0].dtype: 'float13' should be 'auto', "),
        (a_model("    pinned: 1\n"), "models[0].pinned: 1 should be a valid boolean"),
        (a_model("    labels:\n      gpu: 80\n"), "yaml:5: models[0].labels.gpu: 80 should be a valid"),
        (a_model("  - name: chat\n    checkpoint_uri: /x\n"), "model chat stands in models.yaml:2 already"),
        (a_model("    pinned: true\n    pinned: false\n"), "yaml:5: 'pinned' is given twice, first in line"),
        ("models: &all []\n", "models.yaml:1: anchors and aliases are not taken"),
        ("models: [\n", "models.yaml:2: "),
        ("models: []\n", "models.yaml:1: models: [] "),
        ("", "models.yaml:1: this is not a mapping with `models:`"),
        ("[" * 100_000, "nested deeper than 16 levels"),
        ("1: x\n", "models.yaml:1: a key must be text; put it in quotes"),
        ("a: \x00\n", "models.yaml"),
    ],
)  # fmt: skip
def test_what_should_not_be_there_is_refused_with_line_field_and_advice(text: str, told: str) -> None:
    assert told in refusal_of(text)


def test_all_complaints_are_made_at_once() -> None:
    assert len(refusal_of(a_model("    concurrency: 0\n    dtype: x\n    kolor: red\n")).splitlines()) == 3


def test_the_difference_names_what_is_new_changed_unchanged_and_left_alone() -> None:
    deployed = {name: a_deployed(name, concurrency=8) for name in ("a", "b", "old")}
    after = [a_deployed("a", concurrency=8), a_deployed("b", concurrency=4), a_deployed("new")]

    changes = plan(deployed, after, prune=False)

    assert [(change.name, change.kind) for change in changes] == [
        ("a", "same"), ("b", "change"), ("new", "create"), ("old", "keep"),
    ]  # fmt: skip
    assert "    concurrency: 8 → 4" in lines(changes)
    assert "1 not in the file, left alone (--prune deletes): old" in lines(changes)


def test_a_new_model_is_shown_with_what_its_file_switches_on() -> None:
    (shown,) = lines(plan({}, [a_deployed("new", pinned=True, labels={"team": "red"})], prune=False))

    assert shown.startswith("+ new: checkpoint_uri ")
    assert shown.endswith(", labels team=red, pinned true")


def test_only_prune_deletes_what_the_file_does_not_list() -> None:
    assert plan({"old": a_deployed("old")}, [], prune=True) == (Change(name="old", kind="delete"),)


def test_a_checkpoint_whose_bytes_changed_is_a_change() -> None:
    newer = a_deployed()
    newer.checkpoint.revision = "r2"

    (change,) = plan({"chat": a_deployed()}, [newer], prune=False)

    assert change.fields == (("checkpoint revision", "r1", "r2"),)

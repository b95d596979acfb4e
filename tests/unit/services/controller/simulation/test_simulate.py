"""`stoker simulate`, as its user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.controller.simulation import scenario
from services.controller.simulation.__main__ import app
from services.controller.simulation.hardware import PAPER_NODE, opt_models
from services.controller.simulation.scenario import POLICIES, parse_models
from services.controller.simulation.workload import Request
from stoker.errors import InvalidRequest

SHORT = ["--seconds", "60", "--rate", "1", "--models", "opt-6.7b:4", "--nodes", "2"]


def test_every_policy_has_a_line_and_the_same_seed_gives_the_same_table() -> None:
    first, second = (CliRunner().invoke(app, SHORT, catch_exceptions=False).output for _ in range(2))

    assert len(first.splitlines()) == 3 + len(POLICIES)
    assert first == second


def test_figures_go_to_a_file_for_machines_and_to_a_picture(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    arguments = [*SHORT, "--policy", "serverless", "--json", str(figures), "--plot", str(picture)]

    CliRunner().invoke(app, arguments, catch_exceptions=False)

    (summary,) = json.loads(figures.read_text())
    assert summary["requests"] == 60
    for time in ("startup", "first_token"):
        assert 0 < summary[f"{time}_p50"] <= summary[f"{time}_p95"] <= summary[f"{time}_p99"]
        assert summary[f"{time}_mean"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_failing_hosts_lose_no_request_that_fits_elsewhere(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = [
        *SHORT,
        "--failures",
        "300",
        "--nodes",
        "3",
        "--json",
        str(figures),
        "--policy",
        "serverless",
    ]

    CliRunner().invoke(app, arguments, catch_exceptions=False)

    (summary,) = json.loads(figures.read_text())
    assert summary["preemptions"] > 0
    assert summary["lost"] == 0


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"'best' is none of .*serverless"):
        CliRunner().invoke(app, [*SHORT, "--policy", "best"], catch_exceptions=False)


@pytest.mark.parametrize("text", ["", "opt-6.7b:x", "opt-6.7b:00", "gpt-5:2", "opt-6.7b:2,,"])
def test_models_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="SIZE:COUNT"):
        parse_models(text)


def test_a_size_that_is_named_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"opt-6\.7b twice"):
        parse_models("opt-6.7b:2,opt-6.7b:3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--models", "opt-30b:2", "--devices", "1"],
            r"opt-30b-00 needs 2 A40 of one host, the largest",
        ),
        (["--rate", "0.001"], "are no request"),
        (["--trace", "a.csv", "--invocations", "b.csv"], "two traces"),
        (["--json", "nowhere/figures.json"], "there is no folder"),
        (["--json", "."], "this is a folder"),
        (["--plot", "picture.doc"], "its suffix is none of"),
    ],
)
def test_what_cannot_be_simulated_or_written_is_refused_at_once(arguments: list[str], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        CliRunner().invoke(app, [*SHORT, "--policy", "serverless", *arguments], catch_exceptions=False)


def test_a_cluster_that_has_stood_starts_from_memory_and_one_that_has_not_from_disk() -> None:
    models = opt_models("opt-6.7b", 4)
    asked = [Request(0.0, models[0].name, 64, 8)]

    (at_once,) = scenario.simulate(["stoker"], [PAPER_NODE] * 2, models, asked, seed=1)
    (later,) = scenario.simulate(["stoker"], [PAPER_NODE] * 2, models, asked, seed=1, standing_seconds=30.0)

    from_disk = models[0].weight_bytes / PAPER_NODE.disk_bytes_per_second
    from_memory = models[0].weight_bytes / PAPER_NODE.device.bus_bytes_per_second
    assert at_once.startup_mean == pytest.approx(from_disk + PAPER_NODE.overhead_seconds)
    assert later.startup_mean == pytest.approx(from_memory + PAPER_NODE.overhead_seconds)


def test_every_policy_keeps_an_unused_replica_as_long_as_a_load_from_disk() -> None:
    (model,) = opt_models("opt-6.7b", 1)
    # From disk; from memory, in a third of the time; a second after that one was idle.
    asked = [Request(at, model.name, 64, 8) for at in (0.0, 8.0, 10.0)]
    starts: list[int] = []

    for policy in ("reactive", "shepherd", "serverless"):
        scenario.simulate(
            [policy],
            [PAPER_NODE],
            [model],
            asked,
            seed=1,
            then=lambda world: starts.append(world.counters.starts),
        )

    assert starts == [2, 2, 2]

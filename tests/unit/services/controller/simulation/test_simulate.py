"""`stoker simulate`, as its user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.controller.simulation.__main__ import app
from services.controller.simulation.scenario import POLICIES, parse_models
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
    assert 0 < summary["startup_p50"] <= summary["startup_p99"]
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


@pytest.mark.parametrize("text", ["", "opt-6.7b:x", "gpt-5:2", "opt-6.7b:2,,"])
def test_models_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="SIZE:COUNT"):
        parse_models(text)

"""How a client finds a cluster: what it was told, the environment, `stoker up`, the default; in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from stoker.client import connection
from stoker.client.connection import LocalCluster, cluster_file, data_home, find_controller, find_gateway


class Finder(NamedTuple):
    """A function, and what it must return when each of its sources has the word."""

    find: Callable[[str | None], str]
    variable: str
    up: str
    default: str


FINDERS = [
    pytest.param(Finder(find_controller, "STOKER_CONTROLLER", "up:3", "127.0.0.1:7070"), id="controller"),
    pytest.param(Finder(find_gateway, "STOKER_GATEWAY", "up:2", "127.0.0.1:8001"), id="gateway"),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be a user who has set nothing and runs nothing."""
    for variable in ("STOKER_CONTROLLER", "STOKER_GATEWAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    return tmp_path


def run_up(home: Path) -> None:
    """Leave what a running `stoker up` writes; this process stands in for it."""
    LocalCluster(
        pid=os.getpid(),
        rest_url="http://up:1",
        gateway="up:2",
        controller="up:3",
        node_agent="up:4",
        store="up:5",
    ).write(cluster_file(home))


@pytest.mark.parametrize("finder", FINDERS)
def test_an_argument_wins_over_everything(
    finder: Finder, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_up(home)
    monkeypatch.setenv(finder.variable, "env:9")

    assert finder.find("told:9") == "told:9"


@pytest.mark.parametrize("finder", FINDERS)
def test_the_environment_wins_over_what_runs_here(
    finder: Finder, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_up(home)
    monkeypatch.setenv(finder.variable, "env:9")

    assert finder.find(None) == "env:9"


@pytest.mark.parametrize("finder", FINDERS)
def test_what_runs_here_wins_over_the_default(finder: Finder, home: Path) -> None:
    run_up(home)

    assert finder.find(None) == finder.up


@pytest.mark.parametrize("finder", FINDERS)
def test_what_ran_here_and_was_killed_is_passed_over(
    finder: Finder, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_up(home)
    monkeypatch.setattr(connection, "is_alive", lambda pid: False)

    assert finder.find(None) == finder.default


@pytest.mark.parametrize("finder", FINDERS)
def test_with_nothing_set_and_nothing_running_the_default_holds(finder: Finder) -> None:
    assert finder.find(None) == finder.default


def test_the_data_folder_follows_the_xdg_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")

    assert data_home() == Path("/data/stoker")


def test_without_any_convention_the_data_folder_is_below_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")

    assert data_home() == Path("/home/ada/.local/share/stoker")


def test_a_home_may_be_written_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STOKER_HOME", "~/models")

    assert data_home() == tmp_path / "models"


def test_a_description_is_written_whole_or_not_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_up(home)
    before = cluster_file(home).read_text()

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run_up(home)

    assert cluster_file(home).read_text() == before

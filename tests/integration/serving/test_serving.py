"""The lifecycle every process shares, with real signals to a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stoker.serving import EXIT_FAILED

KETTLE = Path(__file__).with_name("kettle.py")
LIMIT_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What a kettle did from its start to its end."""

    status: int
    steps: list[str]
    log: list[dict[str, Any]]

    def events(self) -> list[str]:
        """Return the events it logged."""
        return [line["event"] for line in self.log]


@contextmanager
def kettle(**settings: object) -> Iterator[subprocess.Popen[str]]:
    """Run a kettle; it is gone afterwards."""
    environment = os.environ | {
        f"STOKER_KETTLE_{name.upper()}": str(value) for name, value in settings.items()
    }
    with subprocess.Popen(
        [sys.executable, str(KETTLE)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], step: str) -> list[str]:
    """Return what it printed up to the line that begins with `step`."""
    assert process.stdout is not None
    steps: list[str] = []
    while not steps or not steps[-1].startswith(step):
        line = process.stdout.readline()
        assert line, f"it ended before {step!r}, after {steps}"
        steps.append(line.strip())
    return steps


def rest(process: subprocess.Popen[str], before: list[str] | None = None) -> Life:
    """Return its whole life once it has ended by itself."""
    printed, logged = process.communicate(timeout=LIMIT_SECONDS)
    return Life(
        status=process.returncode,
        steps=[*(before or []), *printed.splitlines()],
        log=[json.loads(line) for line in logged.splitlines() if line.startswith("{")],  # gRPC adds text
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(how: signal.Signals) -> None:
    with kettle(drain_seconds=7) as process:
        steps = until(process, "port")
        process.send_signal(how)
        life = rest(process, steps)

    assert life.status == 0
    assert [step.split()[0] for step in life.steps] == ["start", "port", "stop_serving", "drain", "close"]
    assert "drain 7" in life.steps
    assert life.events() == ["service.started", "service.stopped"]


def test_a_start_that_is_refused_closes_and_says_why_in_one_line() -> None:
    with kettle(trouble="refuse") as process:
        life = rest(process)

    assert (life.status, life.steps) == (EXIT_FAILED, ["start", "close"])
    assert life.events() == ["service.stopped", "service.failed"]
    assert life.log[-1]["message"] == "no water: fill it"
    assert life.log[-1]["error_code"] == "config_error"


def test_a_start_that_crashes_closes_and_leaves_its_trace() -> None:
    with kettle(trouble="crash") as process:
        life = rest(process)

    assert (life.status, life.steps) == (EXIT_FAILED, ["start", "close"])
    assert life.events() == ["service.stopped", "service.crashed"]
    assert "ZeroDivisionError: by zero" in life.log[-1]["exception"]


def test_a_signal_during_the_start_ends_it() -> None:
    """A service that waits for its state, say, must not be deaf until it has it."""
    with kettle(trouble="hang") as process:
        steps = until(process, "hanging")
        process.terminate()
        life = rest(process, steps)

    assert (life.status, life.steps) == (0, ["start", "hanging", "close"])
    assert life.events() == ["service.start_cancelled", "service.stopped"]


def test_a_service_that_ends_itself_leaves_in_order_and_fails() -> None:
    with kettle(trouble="end_within") as process:
        life = rest(process)

    assert life.status == EXIT_FAILED
    assert [step.split()[0] for step in life.steps] == ["start", "port", "stop_serving", "drain", "close"]


def test_a_wrong_log_level_is_named_in_one_line() -> None:
    with kettle(log_level="LOUD") as process:
        life = rest(process)

    assert (life.status, life.steps, life.events()) == (EXIT_FAILED, [], ["service.failed"])
    assert "LOUD" in life.log[0]["message"]


@pytest.mark.parametrize("setting", ["address", "metrics_port"])
def test_a_taken_port_is_named_in_one_line(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1" if setting == "address" else "", 0))
        taken.listen()
        port = taken.getsockname()[1]
        value = f"127.0.0.1:{port}" if setting == "address" else port
        with kettle(**{setting: value}) as process:
            life = rest(process)

    failed = [line for line in life.log if line["event"] == "service.failed"]
    assert life.status == EXIT_FAILED
    assert len(failed) == 1
    assert str(port) in failed[0]["message"]

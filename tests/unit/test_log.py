"""Logs: one JSON object per line, with the ids that are bound."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from stoker import log
from stoker.errors import ConfigError


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return what was logged on stderr; stdout stays clean, it belongs to results."""
    out, err = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_a_line_is_json_with_its_facts_and_who_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=True)

    log.get().info("water.boiled", seconds=1.5)

    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "water.boiled", "seconds": 1.5, "service": "kettle", "level": "info"}


def test_bound_ids_are_on_every_line_within_and_on_none_after(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=True)

    with log.bind(request_id="req-1"):
        log.get().info("cup.filled")
        log.get().info("cup.served")
    log.get().info("water.boiled")

    assert [line.get("request_id") for line in lines(capsys)] == ["req-1", "req-1", None]


def test_a_thread_that_no_context_reached_says_its_service_too(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=True)

    thread = threading.Thread(target=lambda: log.get().info("water.boiled"))
    thread.start()
    thread.join()

    assert [line["service"] for line in lines(capsys)] == ["kettle"]


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", level="warning", json=True)

    log.get().info("water.boiled")
    log.get().warning("water.low")

    assert [line["event"] for line in lines(capsys)] == ["water.low"]


def test_a_trace_stays_within_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=True)

    log.get().error("kettle.crashed", exc_info=ZeroDivisionError("by zero"))

    (line,) = lines(capsys)
    assert line["exception"].endswith("ZeroDivisionError: by zero")


def test_a_library_that_logs_comes_out_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=True)

    logging.getLogger("some.library").warning("low on %s", "water")
    logging.getLogger("some.library").info("not worth a line")

    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["service"]) == ("low on water", "warning", "kettle")


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle", json=False)

    log.get().info("water.boiled", seconds=1.5)

    err = capsys.readouterr().err
    assert "water.boiled" in err
    assert not err.startswith("{")


def test_away_from_a_terminal_the_default_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("kettle")

    log.get().info("water.boiled")

    assert [line["event"] for line in lines(capsys)] == ["water.boiled"]


def test_a_level_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="log level 'LOUD': set DEBUG"):
        log.configure("kettle", level="LOUD")

"""Every scenario file plays to its end: each decision is expected, each expectation holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.script import ScriptError, play

FILES = sorted(Path(__file__).parent.glob("*.scenario"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_scenario_plays_as_written(path: Path) -> None:
    play(path.read_text())


def test_a_decision_nobody_expected_fails_the_scenario() -> None:
    with pytest.raises(ScriptError, match=r"not expected: .'start m\.1 on a/0'"):
        play("model m\nnode a\nask m\n")


def test_an_expectation_that_does_not_hold_names_its_line() -> None:
    with pytest.raises(ScriptError, match=r"line 4: expect start m\.1 on b"):
        play("model m\nnode a\nask m\nexpect start m.1 on b\n")


def test_a_line_without_meaning_is_refused() -> None:
    with pytest.raises(ScriptError, match="line 1: 'dance' is none of"):
        play("dance\n")

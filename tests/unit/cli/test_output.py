"""What commands print: results on stdout for machines and people, everything else on stderr."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from stoker.cli import output
from stoker.v1 import model_pb2


class Printed:
    """What went to stdout and to stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
        self._streams = {name: io.StringIO() for name in ("console", "errors")}
        for name, stream in self._streams.items():
            console = Console(
                file=stream, soft_wrap=True, force_terminal=terminal, color_system=None, width=20
            )
            monkeypatch.setattr(output, name, console)

    @property
    def results(self) -> list[str]:
        """Return the lines on stdout."""
        return self._streams["console"].getvalue().splitlines()

    @property
    def remarks(self) -> list[str]:
        """Return the lines on stderr."""
        return self._streams["errors"].getvalue().splitlines()


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Print into a narrow pipe."""
    return Printed(monkeypatch, terminal=False)


def test_json_is_one_document_with_readable_letters(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json([{"name": "größe"}])

    out = capsys.readouterr().out
    assert json.loads(out) == [{"name": "größe"}]
    assert "größe" in out


def test_a_message_becomes_json_with_the_protos_names_and_its_unset_numbers() -> None:
    fields = output.as_json(model_pb2.ModelSpec(name="tiny", max_replicas=2))

    assert (fields["name"], fields["max_replicas"], fields["min_replicas"]) == ("tiny", 2, 0)


def test_a_number_that_was_left_to_the_default_is_not_shown_as_zero() -> None:
    """`keep_alive_seconds` of 0 means stop at once: unset is something else."""
    assert "keep_alive_seconds" not in output.as_json(model_pb2.ModelSpec())


def test_columns_are_aligned_and_nothing_is_cut_where_it_is_narrow(printed: Printed) -> None:
    output.print_table(
        ["NAME", "STATE"], [["tiny", "ready"], ["a-name-longer-than-the-pipe", "cold"]], empty="none"
    )

    assert [line.split() for line in printed.results] == [
        ["NAME", "STATE"],
        ["tiny", "ready"],
        ["a-name-longer-than-the-pipe", "cold"],
    ]
    assert (
        len(
            {line.index(word) for line, word in zip(printed.results, ["STATE", "ready", "cold"], strict=True)}
        )
        == 1
    )


def test_brackets_in_a_name_are_not_markup(printed: Printed) -> None:
    output.print_table(["NAME"], [["[bold]"]], empty="none")

    assert printed.results[1].strip() == "[bold]"


def test_an_empty_table_says_so_beside_the_results(printed: Printed) -> None:
    output.print_table(["NAME"], [], empty="no models: deploy one")

    assert (printed.results, printed.remarks) == ([], ["no models: deploy one"])


def test_remarks_are_for_people_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Printed(monkeypatch, terminal=True)
    output.say("starting [1/2]")
    unwatched = Printed(monkeypatch, terminal=False)
    output.say("starting [1/2]")

    assert (watched.remarks, unwatched.remarks) == (["starting [1/2]"], [])

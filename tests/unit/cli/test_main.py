"""How the command ends when something failed."""

from __future__ import annotations

import io

import grpc
import pytest
from rich.console import Console

from stoker.cli import main
from stoker.errors import NotFound, PeerError, StokerError
from stoker.rpc import from_rpc_error

REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7072: "
    "Failed to connect to remote host: Connection refused"
)


def unreachable() -> StokerError:
    """What a call of a service that does not run fails with."""
    none = grpc.aio.Metadata()
    call = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, details=REFUSED)
    return from_rpc_error(call, "store 127.0.0.1:7072")


@pytest.fixture
def ended_with(monkeypatch: pytest.MonkeyPatch):
    """Return exit status and stderr of a command that raises an error."""

    def run(error: StokerError) -> tuple[object, str]:
        def app(**_: object) -> None:
            raise error

        stream = io.StringIO()
        monkeypatch.setattr(main, "app", app)
        monkeypatch.setattr(main, "errors", Console(file=stream, soft_wrap=True, color_system=None))
        with pytest.raises(SystemExit) as end:
            main.run()
        return end.value.code, stream.getvalue()

    return run


def test_a_service_that_does_not_answer_is_named_with_the_reason_and_how_to_start_it(ended_with) -> None:
    status, said = ended_with(unreachable())

    assert status == main.EXIT_FAILED
    assert said.splitlines() == [
        "error: store 127.0.0.1:7072 cannot be reached: Connection refused",
        "is it running? `stoker up` starts everything on this host",
    ]


@pytest.mark.parametrize("error", [PeerError("http://origin/m: 503 (tried 5 times in a row)"), NotFound("x")])
def test_what_starting_a_service_would_not_help_is_told_without_that_hint(ended_with, error) -> None:
    assert ended_with(error) == (main.EXIT_FAILED, f"error: {error.message}\n")

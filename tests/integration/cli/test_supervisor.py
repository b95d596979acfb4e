"""The supervisor of `stoker up`, with real processes that do what they are told."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stoker import rpc
from stoker.cli import supervisor as supervisor_module
from stoker.cli.free_ports import free_ports
from stoker.cli.supervisor import ServiceCommand, Supervisor
from stoker.errors import ConfigError
from stoker.process import is_alive

FOLDER = Path(__file__).parent
LIMIT_SECONDS = 60


def free_address() -> str:
    """Return an address nobody listens on now."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def lamp(
    tmp_path: Path, *, name: str = "lamp", ready_seconds: float = LIMIT_SECONDS, **told: str
) -> ServiceCommand:
    """Return how to start a lamp; `told` are its settings."""
    address = free_address()
    settings, prefix = {"address": address} | told, f"STOKER_{name.upper()}_"
    return ServiceCommand(
        name=name,
        module="lamp",
        environment={f"{prefix}{key.upper()}": value for key, value in settings.items()}
        | {"LAMP_PREFIX": prefix},
        health_address=address,
        log_path=tmp_path / "logs" / f"{name}.log",
        ready_seconds=ready_seconds,
    )


@pytest.fixture(autouse=True)
def lamps_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `python -m lamp` find it."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    """Return a supervisor; it is stopped afterwards."""
    opened = Supervisor(drain_seconds=LIMIT_SECONDS)
    yield opened
    await opened.stop()


async def ended(pidfd: int) -> None:
    """Return when the process behind the descriptor has ended."""
    assert (await asyncio.to_thread(select.select, [pidfd], [], [], LIMIT_SECONDS))[0], "it still runs"


async def test_a_service_is_started_when_it_is_healthy(supervisor: Supervisor, tmp_path: Path) -> None:
    command = lamp(tmp_path)

    await supervisor.start(command)

    async with rpc.connect(command.health_address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert is_alive(supervisor.pids()["lamp"])


async def test_a_service_that_dies_at_start_is_refused_with_the_end_of_its_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"lamp ended with status 3; its log .*lamp\.log") as caught:
        await supervisor.start(lamp(tmp_path, trouble="die"))

    assert caught.value.message.endswith("the bulb is broken")


async def test_only_the_log_of_this_start_is_quoted(supervisor: Supervisor, tmp_path: Path) -> None:
    command = lamp(tmp_path, trouble="die")
    command.log_path.parent.mkdir()
    command.log_path.write_text("yesterday's trouble\n")

    with pytest.raises(ConfigError) as caught:
        await supervisor.start(command)

    assert "yesterday" not in caught.value.message
    assert command.log_path.read_text() == "yesterday's trouble\nthe bulb is broken\n"


async def test_a_service_that_never_gets_healthy_is_refused(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lamp did not become healthy"):
        await supervisor.start(lamp(tmp_path, trouble="dark", ready_seconds=0.5))


async def test_after_a_failed_start_stop_ends_those_that_run_and_the_one_that_does_not(
    tmp_path: Path,
) -> None:
    supervisor = Supervisor(drain_seconds=LIMIT_SECONDS)
    await supervisor.start(lamp(tmp_path, name="good"))
    with pytest.raises(ConfigError):
        await supervisor.start(lamp(tmp_path, name="bad", trouble="dark", ready_seconds=0.5))
    pids = supervisor.pids()

    await supervisor.stop()

    assert sorted(pids) == ["bad", "good"]
    assert not any(is_alive(pid) for pid in pids.values())


async def test_a_service_that_is_killed_is_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    command = lamp(tmp_path)
    await supervisor.start(command)
    killed = supervisor.pids()["lamp"]

    os.kill(killed, signal.SIGKILL)

    async with asyncio.timeout(LIMIT_SECONDS), rpc.connect(command.health_address) as channel:
        while supervisor.pids()["lamp"] == killed:  # noqa: ASYNC110 - nobody tells us that a process came back
            await asyncio.sleep(0.01)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), wait_for_ready=True
        )
        answer = await watch.read()
        watch.cancel()
    assert answer == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def test_stop_while_a_service_is_between_two_lives_starts_no_third(tmp_path: Path) -> None:
    """A child that ended is waited for with back-off: stopping then must not leave a new one behind."""
    supervisor = Supervisor(drain_seconds=LIMIT_SECONDS)
    command = lamp(tmp_path)
    await supervisor.start(command)
    pid = supervisor.pids()["lamp"]
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await ended(descriptor)
    os.close(descriptor)

    await supervisor.stop()

    assert supervisor.pids() == {}
    with socket.socket() as probe:
        host, port = command.health_address.split(":")
        assert probe.connect_ex((host, int(port))) != 0


async def test_a_service_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "KILL_AFTER_SECONDS", 0.1)
    supervisor = Supervisor(drain_seconds=0)
    await supervisor.start(lamp(tmp_path, stubborn="yes"))
    pid = supervisor.pids()["lamp"]

    await supervisor.stop()

    assert not is_alive(pid)


async def test_settings_of_the_service_in_the_environment_are_not_inherited(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a person has set for a service run by hand must not leak into `stoker up`."""
    monkeypatch.setenv("STOKER_LAMP_TROUBLE", "die")

    await supervisor.start(lamp(tmp_path))

    assert is_alive(supervisor.pids()["lamp"])

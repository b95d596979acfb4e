"""A tiny service in a process of its own, which prints each step of its life: run by test_serving.py.

What it does is told in STOKER_KETTLE_* variables.
"""

from __future__ import annotations

import asyncio
import sys

from pydantic_settings import SettingsConfigDict

from stoker.errors import ConfigError
from stoker.rpc import Server
from stoker.serving import run
from stoker.settings import ServiceSettings, load_settings


class Settings(ServiceSettings):
    """Settings of the kettle."""

    model_config = SettingsConfigDict(env_prefix="STOKER_KETTLE_")

    address: str = "127.0.0.1:0"
    """host:port it listens on."""

    trouble: str = ""
    """What goes wrong at start: `refuse`, `crash`, `hang`, `end_within`, or nothing."""


class Kettle:
    """Prints what is asked of it."""

    def __init__(self, settings: Settings, ended_within: asyncio.Event) -> None:
        self._settings = settings
        self._ended_within = ended_within
        self._server = Server([])

    async def start(self) -> None:
        """Listen, unless told to fail."""
        say("start")
        port = self._server.bind(self._settings.address)
        match self._settings.trouble:
            case "refuse":
                raise ConfigError("no water: fill it")
            case "crash":
                raise ZeroDivisionError("by zero")
            case "hang":
                say("hanging")
                await asyncio.Event().wait()
            case "end_within":
                self._ended_within.set()
        await self._server.start()
        say(f"port {port}")

    async def stop_serving(self) -> None:
        """See `Service`."""
        await self._server.set_serving(serving=False)
        say("stop_serving")

    async def drain(self, grace_seconds: float) -> None:
        """See `Service`."""
        say(f"drain {grace_seconds:g}")

    async def close(self) -> None:
        """See `Service`."""
        await self._server.stop()
        say("close")


def say(step: str) -> None:
    """Print a step at once."""
    sys.stdout.write(step + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    found = load_settings(Settings)
    run("kettle", found, lambda ended_within: Kettle(found, ended_within))

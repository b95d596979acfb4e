"""The real gateway as a process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[3]
START_SECONDS = 90
"""And for any other line of its log: ends what would hang, also on a busy machine."""


class GatewayProcess:
    """Started on free ports; its log is kept."""

    def __init__(self, controller_address: str, cache_dir: Path, **settings: Any) -> None:
        self._settings = {
            "controllers": json.dumps([controller_address]),
            "cache_dir": str(cache_dir),
            "address": "127.0.0.1:0",
            "grpc_address": "127.0.0.1:0",
            "keepalive_seconds": "0.1",
        } | {name: str(value) for name, value in settings.items()}
        self.log: list[dict[str, Any]] = []
        self._logged = asyncio.Condition()
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]
        self.url = self.grpc_address = ""

    async def __aenter__(self) -> Self:
        """Start it and return when it serves."""
        await self.spawn()
        listening = await self.wait_for_log("gateway.listening")
        self.url = f"http://{listening['address']}"
        self.grpc_address = f"127.0.0.1:{listening['grpc_port']}"
        return self

    async def spawn(self) -> None:
        """Start it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STOKER_")} | {
            f"STOKER_GATEWAY_{name.upper()}": value for name, value in self._settings.items()
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.gateway",
            cwd=ROOT,
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())

    async def __aexit__(self, *_: object) -> None:
        """Stop it as an operator would."""
        await self.stop()

    async def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        if self._process.returncode is None:
            self._process.terminate()
        status = await self._process.wait()
        await self._reader
        return status

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    async def wait_for_log(self, event: str, **facts: Any) -> dict[str, Any]:
        """Return the first log line of this event with these facts."""
        async with asyncio.timeout(START_SECONDS), self._logged:
            while True:
                for line in self.log:
                    if line.get("event") == event and all(
                        line.get(key) == fact for key, fact in facts.items()
                    ):
                        return line
                await self._logged.wait()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": "text", "text": line.decode()}
            async with self._logged:
                self.log.append(entry)
                self._logged.notify_all()

"""Real services as processes: a store, a node agent; their logs as they come."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[3]


class ServiceProcess:
    """`python -m services.<name>`, with its log lines as dictionaries."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.log: list[dict[str, Any]] = []
        self._settings = settings
        self._logged = asyncio.Condition()
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STOKER_")}
        for key, value in self._settings.items():
            text = value if isinstance(value, str | Path) else json.dumps(value)
            environment[f"STOKER_{self.name}_{key}".upper()] = str(text)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"services.{self.name}",
            cwd=ROOT,
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())
        await self.wait_for_log("service.started")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
        await self.ended()

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    def send(self, signum: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(signum)

    async def ended(self) -> int:
        """Return the exit status, once it has ended."""
        status = await self._process.wait()
        await self._reader
        return status

    async def wait_for_log(self, event: str, *, nth: int = 1, **fields: Any) -> dict[str, Any]:
        """Return the first (or nth) line of this event with these fields, as soon as there is one."""

        def found() -> dict[str, Any] | None:
            fitting = [
                line for line in self.log if line.get("event") == event and fields.items() <= line.items()
            ]
            if len(fitting) >= nth:
                return fitting[nth - 1]
            if self._reader.done():
                raise AssertionError(f"{self.name} ended without {event}: {self.log}")
            return None

        async with self._logged:
            return await self._logged.wait_for(found)

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            try:
                line = json.loads(raw)
            except ValueError:
                line = {"event": "text", "text": raw.decode()}
            await self._note(line)
        await self._note({"event": "test.ended"})

    async def _note(self, line: dict[str, Any]) -> None:
        async with self._logged:
            self.log.append(line)
            self._logged.notify_all()

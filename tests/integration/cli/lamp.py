"""A tiny service that `stoker up`'s supervisor can start: told by <LAMP_PREFIX>* variables what to do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from stoker.process import die_with_parent
from stoker.rpc import Server

PREFIX = os.environ["LAMP_PREFIX"]
TOLD = {key.removeprefix(PREFIX): value for key, value in os.environ.items() if key.startswith(PREFIX)}


async def shine() -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    if TOLD.get("STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = Server([])
    server.bind(TOLD["ADDRESS"])
    await server.start()
    await stop.wait()
    await server.stop()


if __name__ == "__main__":
    die_with_parent(int(TOLD["PARENT_PID"]))
    trouble = TOLD.get("TROUBLE")
    if trouble == "die":
        sys.stderr.write("the bulb is broken\n")
        sys.exit(3)
    if trouble == "dark":
        sys.stderr.write("nobody switched it on\n")
        sys.stderr.flush()
        signal.pause()
    asyncio.run(shine())

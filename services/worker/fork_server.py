"""`python -m services.worker.fork_server`: has a worker's imports done, and forks workers from itself.

Rules:
1. What can't be forked never comes to be here: when a worker is forked, this process has one thread, no gRPC
   object, no event loop, no CUDA context, and has computed nothing. `refuse_what_cannot_be_forked` looks.
2. A worker is the node agent's own child (`forking`): it dies with the agent and outlives this process.
3. This process ends when the agent closes its end of the pair, and dies with the agent.

The agent and this process speak over one end each of a pair of `SOCK_SEQPACKET` sockets, JSON in each packet:

- `{"ready_seconds": 6.1}` from here, once, when the imports are done;
- `["--socket", "/run/..."]` from the agent: a worker's arguments, with two descriptors: where its output
  goes, and where it waits for one byte;
- `{"pid": 4711}` from here for each of these, or `{"errno": 11}` when the kernel would make no process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from services.worker.forking import serve
from stoker.process import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

THREAD_END_SECONDS = 5.0
"""How long the kernel may take to remove a thread that Python has joined."""


class NotForkable(Exception):
    """This process is in a state that a forked worker could not live with."""


def import_all(niceness: int) -> None:
    """Import all that a worker needs before it has a model, in a thread that has ended on return.

    Args:
        niceness: Of the imports. It belongs to that thread: workers are forked from another.

    Raises:
        Exception: What the imports raise.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            if niceness:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
            import setproctitle  # noqa: F401, PLC0415 - all of these: what children need, already there
            import uvloop  # noqa: F401, PLC0415 - as above

            import services.worker.load  # noqa: PLC0415 - as above
            import services.worker.shell  # noqa: PLC0415 - as above
            import services.worker.warm  # noqa: F401, PLC0415 - as above
            from services.worker.model_loading import (  # noqa: PLC0415 - as above
                import_popular_architectures,
                supported_architectures,
            )

            import_popular_architectures()
            supported_architectures()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    importing = threading.Thread(target=run, name="imports")
    importing.start()
    importing.join()
    if failed:
        raise failed[0]


def refuse_what_cannot_be_forked() -> None:
    """Look whether a process forked from this one would be whole.

    Raises:
        NotForkable: There is a second thread, or CUDA was initialised or asked for its devices.
    """
    import torch  # noqa: PLC0415 - imported before

    patience_ends_seconds = time.monotonic() + THREAD_END_SECONDS
    while (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        if time.monotonic() > patience_ends_seconds:
            raise NotForkable(f"the imports left {threads} threads: a forked worker would lack them")
        time.sleep(0.001)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch's own lack
        raise NotForkable("CUDA was initialised by the imports: a forked worker could not use it")
    if _in_forked_process(torch.cuda._is_in_bad_fork):  # noqa: SLF001 - torch's only sign, and only in a child
        raise NotForkable("CUDA was asked for its devices by the imports: a forked worker could not use it")


def _in_forked_process(holds: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(1 if holds() else 0)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def main() -> None:
    """Import, say so, then fork until the agent is gone."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.fork_server", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of this end of the pair")
    parser.add_argument("--parent-pid", type=int, required=True, help="the node agent; ends with it")
    parser.add_argument("--niceness", type=int, default=0, help="of the imports; as nice(1)")
    options = parser.parse_args()
    die_with_parent(options.parent_pid, signal.SIGKILL)
    agent = socket.socket(fileno=options.channel)

    began_seconds = time.monotonic()
    import_all(options.niceness)
    refuse_what_cannot_be_forked()
    from services.worker.__main__ import main as work  # noqa: PLC0415 - imports the rest of the worker

    gc.collect()
    gc.freeze()  # a collection in a worker must not write to, and so copy, the pages all of them share
    agent.send(json.dumps({"ready_seconds": time.monotonic() - began_seconds}).encode())
    serve(agent, work)


if __name__ == "__main__":
    main()

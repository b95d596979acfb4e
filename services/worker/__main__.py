"""`python -m services.worker`: started or forked for the node agent, never outlives it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from stoker.process import die_with_parent


def main(arguments: Sequence[str]) -> NoReturn:
    """Tie this process to its parent, then import the rest and serve.

    Args:
        arguments: Of the command line; `services.worker.settings.parse` says which.
    """
    from services.worker.settings import WorkerSettings, parse  # noqa: PLC0415 - after the tie to the parent

    values = parse(arguments)
    if parent_pid := int(values.pop("parent_pid")):
        die_with_parent(parent_pid, signal.SIGKILL)

    from services.worker.shell import WorkerShell  # noqa: PLC0415 - imports gRPC: after the tie to the parent
    from stoker.errors import ConfigError  # noqa: PLC0415 - as above
    from stoker.serving import EXIT_CONFIG, run  # noqa: PLC0415 - as above
    from stoker.settings import load_settings  # noqa: PLC0415 - as above

    try:
        settings = load_settings(WorkerSettings, **values)
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(EXIT_CONFIG)
    run("worker", settings, lambda ended_within: WorkerShell(settings, ended_within))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`python -m services.node_agent`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read at import; we only fork to exec workers

from services.node_agent.service import NodeAgentService
from services.node_agent.settings import NodeAgentSettings
from stoker.errors import ConfigError
from stoker.serving import EXIT_CONFIG, run
from stoker.settings import load_settings


def main() -> None:
    """Read the settings and serve until a signal comes."""
    try:
        settings = load_settings(NodeAgentSettings)
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(EXIT_CONFIG)
    run("node_agent", settings, lambda ended_within: NodeAgentService(settings, ended_within))


if __name__ == "__main__":
    main()

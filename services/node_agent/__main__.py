"""`python -m services.node_agent`."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read at import; we only fork to exec workers

from services.node_agent.service import NodeAgentService
from services.node_agent.settings import NodeAgentSettings
from stoker.serving import main

if __name__ == "__main__":
    main("node_agent", NodeAgentSettings, NodeAgentService)

"""`python -m services.gateway`."""

from __future__ import annotations

import sys

from services.gateway.service import GatewayService
from services.gateway.settings import GatewaySettings
from stoker import serving
from stoker.errors import ConfigError
from stoker.settings import load_settings

if __name__ == "__main__":
    try:
        settings = load_settings(GatewaySettings)
    except ConfigError as error:
        sys.stderr.write(f"stoker gateway: {error.message}\n")
        sys.exit(serving.EXIT_CONFIG)
    serving.run("gateway", settings, lambda _ended: GatewayService(settings))

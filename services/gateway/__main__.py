"""`python -m services.gateway`."""

from __future__ import annotations

from services.gateway.service import GatewayService
from services.gateway.settings import GatewaySettings
from stoker.serving import main

if __name__ == "__main__":
    main("gateway", GatewaySettings, lambda settings, _ended: GatewayService(settings))

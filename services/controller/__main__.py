"""`python -m services.controller`."""

from __future__ import annotations

from services.controller.service import ControllerProcess
from services.controller.settings import ControllerSettings
from stoker.serving import main

if __name__ == "__main__":
    main("controller", ControllerSettings, ControllerProcess)

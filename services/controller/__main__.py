"""`python -m services.controller`."""

from __future__ import annotations

from services.controller.garbage import collect_rarely
from services.controller.service import ControllerProcess
from services.controller.settings import ControllerSettings
from stoker.serving import main

if __name__ == "__main__":
    collect_rarely()
    main("controller", ControllerSettings, ControllerProcess)

"""`python -m services.store`: run the checkpoint store daemon."""

from __future__ import annotations

import sys

from services.store.service import StoreService
from services.store.settings import StoreSettings
from stoker import log
from stoker.errors import ConfigError
from stoker.serving import EXIT_CONFIG, run
from stoker.settings import load_settings


def main() -> None:
    """Read the settings and run until a signal."""
    try:
        settings = load_settings(StoreSettings)
    except ConfigError as error:
        log.configure("store")
        log.get().error("service.failed", error_code=error.code, message=error.message)
        sys.exit(EXIT_CONFIG)
    run("store", settings, lambda ended_within: StoreService(settings, ended_within))


if __name__ == "__main__":
    main()

"""`python -m services.store`: run the checkpoint store daemon."""

from __future__ import annotations

from services.store.service import StoreService
from services.store.settings import StoreSettings
from stoker.serving import main

if __name__ == "__main__":
    main("store", StoreSettings, StoreService)

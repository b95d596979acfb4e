"""What every test gets: logging as it was before, and property tests that do the same in every run.

`HYPOTHESIS_PROFILE=search` lets them look for new examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a test configured: its captured stderr is closed when it ends."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()

"""What every test gets: logging as it was, property tests that do the same in every run, the real model.

`HYPOTHESIS_PROFILE=search` lets them look for new examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of the real chat model that `make test` has prepared."""
    folder = os.environ.get("STOKER_TEST_MODEL")
    if not folder:
        pytest.fail("STOKER_TEST_MODEL is not set: run the tests with `make test`, which gets the model")
    return Path(folder)

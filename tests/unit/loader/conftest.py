from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture
def run_python():
    """Run code in an interpreter of its own and return what it prints."""

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    return run

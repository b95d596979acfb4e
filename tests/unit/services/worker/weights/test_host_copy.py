"""Copies to this process's own memory."""

from __future__ import annotations

import pytest

from services.worker.weights import host_copy
from services.worker.weights.host_copy import HostCopyEngine
from stoker.errors import DoesNotFit


def test_more_than_the_host_has_is_refused_before_it_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(host_copy, "available_bytes", lambda _device: 1000)

    with pytest.raises(DoesNotFit, match="STOKER_STORE_POOL_BYTES"):
        HostCopyEngine().allocate(1001)
    assert HostCopyEngine().allocate(1000).numel() == 1000

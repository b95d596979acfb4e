"""A state URL names a backend or is refused."""

from __future__ import annotations

import pytest

from stoker.errors import ConfigError
from stoker.state import open_state
from stoker.state.open import _etcd


@pytest.mark.parametrize(
    "url",
    [
        "",
        "embedded://",
        "embedded://relative/state.db",
        "etcd://",
        "etcd://host",
        "etcd://host:port/x",
        "etcd://user@host:2379/x",
        "etcd://a:1,/x",
        "sqlite:///x",
    ],
)
async def test_what_is_no_state_url_is_refused_with_those_that_are(url: str) -> None:
    with pytest.raises(ConfigError, match="none of embedded:///"):
        async with open_state(url):
            pass


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a:1", (["a:1"], "")),
        ("a:1,b.example:2/stoker", (["a:1", "b.example:2"], "stoker/")),
        ("10.0.0.1:2379/a/b/", (["10.0.0.1:2379"], "a/b/")),
        ("[::1]:2379/", (["[::1]:2379"], "")),
    ],
)
def test_an_etcd_url_is_endpoints_and_prefix(location: str, expected: tuple[list[str], str]) -> None:
    assert _etcd(location) == expected

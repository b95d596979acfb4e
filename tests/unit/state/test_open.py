"""A state URL names a backend or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.state import open_state
from stoker.state.open import EtcdAddress, etcd_address


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
        "etcd://a:1?ca=/x",
        "etcds://a:1?cert=/x",
        "etcds://a:1?root=/x",
    ],
)
async def test_what_is_no_state_url_is_refused_with_those_that_are(url: str) -> None:
    with pytest.raises(ConfigError, match="none of embedded:///"):
        async with open_state(url):
            pass


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("etcd://a:1", EtcdAddress(endpoints=("a:1",))),
        ("etcd://a:1,b.example:2/stoker", EtcdAddress(endpoints=("a:1", "b.example:2"), prefix="stoker/")),
        ("etcd://10.0.0.1:2379/a/b/", EtcdAddress(endpoints=("10.0.0.1:2379",), prefix="a/b/")),
        ("etcd://[::1]:2379/", EtcdAddress(endpoints=("[::1]:2379",))),
        ("etcds://a:1/s", EtcdAddress(endpoints=("a:1",), prefix="s/", tls={})),
        (
            "etcds://a:1?ca=/c.pem&cert=/d.pem&key=/k.pem",
            EtcdAddress(
                endpoints=("a:1",),
                tls={"ca": Path("/c.pem"), "cert": Path("/d.pem"), "key": Path("/k.pem")},
            ),
        ),
    ],
)
def test_an_etcd_url_is_endpoints_prefix_and_certificates(url: str, expected: EtcdAddress) -> None:
    assert etcd_address(url) == expected


async def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.pem of the state URL cannot be read"):
        async with open_state(f"etcds://a:1?ca={tmp_path}/none.pem"):
            pass

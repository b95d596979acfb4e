"""What is expected of far tiers before anything was moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.store.link_speed import default_interface, expected_rates, link_bytes_per_second
from services.store.reading.pace import PacedTier

ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0100A8C0 0003 0 0 100 00000000 0 0 0
wlan0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0
eth1 0000A8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0
"""


def host(folder: Path, *, speed: str, routes: str = ROUTES) -> dict[str, Path]:
    """Return a kernel's files that say so."""
    (folder / "eth0").mkdir()
    (folder / "eth0" / "speed").write_text(speed)
    (folder / "route").write_text(routes)
    return {"routes": folder / "route", "interfaces": folder}


def test_the_default_route_with_the_least_metric_names_the_link() -> None:
    assert default_interface(ROUTES) == "eth0"
    assert default_interface(ROUTES.splitlines()[0]) is None


def test_a_link_of_ten_gigabits_carries_its_payload(tmp_path: Path) -> None:
    assert link_bytes_per_second(**host(tmp_path, speed="10000\n")) == pytest.approx(1.16e9, rel=0.01)


@pytest.mark.parametrize("speed", ["-1\n", "", "0"])
def test_a_link_whose_speed_is_not_known_says_nothing(tmp_path: Path, speed: str) -> None:
    assert link_bytes_per_second(**host(tmp_path, speed=speed)) is None


def test_a_host_without_the_kernels_files_says_nothing(tmp_path: Path) -> None:
    assert link_bytes_per_second(tmp_path / "none", tmp_path) is None


def test_a_peer_is_expected_at_the_link_s_rate_and_no_faster_than_it_is_paced() -> None:
    assert expected_rates({}, 1.2e9) == {"peer": 1.2e9}
    assert expected_rates({PacedTier.PEER: 6e7, PacedTier.DISK: 4e7}, 1.2e9) == {"peer": 6e7}


def test_nothing_is_said_of_an_origin_unless_it_is_paced() -> None:
    assert expected_rates({PacedTier.REMOTE: 5e7, PacedTier.PEER: 0.0}, None) == {"remote": 5e7}
    assert expected_rates({}, None) == {}


def test_no_link_is_faster_than_what_a_process_sends() -> None:
    assert expected_rates({}, 11.5e9) == {"peer": 2.0e9}

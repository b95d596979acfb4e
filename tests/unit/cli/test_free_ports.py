"""Ports for services: free, all different, and out of the way of outgoing connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stoker.cli.free_ports import FIRST_PORT, free_ports

if TYPE_CHECKING:
    from pathlib import Path


def test_ports_are_different_and_below_those_of_outgoing_connections(tmp_path: Path) -> None:
    told = tmp_path / "ip_local_port_range"
    told.write_text("32768\t60999\n")

    ports = free_ports(50, ephemeral_range=told)

    assert len(set(ports)) == 50
    assert all(FIRST_PORT <= port < 32768 for port in ports)


@pytest.mark.parametrize("text", ["1024\t65535\n", "", "none"])
def test_where_no_others_are_left_the_kernel_chooses(text: str, tmp_path: Path) -> None:
    told = tmp_path / "ip_local_port_range"
    told.write_text(text)

    assert len(set(free_ports(3, ephemeral_range=told))) == 3
    assert len(set(free_ports(3, ephemeral_range=tmp_path / "missing"))) == 3

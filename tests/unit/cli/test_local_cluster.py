"""`stoker up`: what it refuses before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stoker.cli import local_cluster
from stoker.cli.local_cluster import with_settings
from stoker.cli.local_nodes import service_command
from stoker.cli.supervisor import ServiceCommand
from stoker.client.connection import LocalCluster, cluster_file
from stoker.client.connection import local_cluster as running
from stoker.errors import ConfigError


def test_one_data_folder_serves_one_cluster(tmp_path: Path) -> None:
    with (
        local_cluster._locked(tmp_path),
        pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\) uses {tmp_path}.*--data"),
        local_cluster._locked(tmp_path),
    ):
        pytest.fail("the second one got in")


def test_the_lock_is_free_again_afterwards(tmp_path: Path) -> None:
    with local_cluster._locked(tmp_path):
        pass

    with local_cluster._locked(tmp_path):
        pass


def test_a_deep_data_folder_gets_its_sockets_elsewhere(tmp_path: Path) -> None:
    """Linux refuses unix socket paths beyond 107 bytes."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()

    with local_cluster._run_folder(deep) as folder:
        longest = str(folder) + local_cluster.LONGEST_SOCKET_NAME * "x"

        assert folder.is_dir()
        assert len(longest) <= local_cluster.MAX_SOCKET_PATH
    assert not folder.exists()


def test_a_leftover_run_folder_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attach.sock").touch()

    with local_cluster._run_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []


def _cluster(pid: int) -> LocalCluster:
    return LocalCluster(
        pid=pid, rest_url="http://a:1", gateway="a:2", controller="a:3", node_agent="a:4", store="a:5"
    )


def test_a_running_cluster_is_found_by_its_data_folder(tmp_path: Path) -> None:
    cluster = _cluster(os.getpid())
    cluster.write(cluster_file(tmp_path))

    assert running(tmp_path) == cluster


def test_a_cluster_that_was_killed_is_not_found(tmp_path: Path) -> None:
    _cluster(2**22 - 1).write(cluster_file(tmp_path))

    assert running(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_a_damaged_description_is_no_cluster(tmp_path: Path, content: str) -> None:
    cluster_file(tmp_path).write_text(content)

    assert running(tmp_path) is None


def test_further_settings_reach_each_process_of_their_service() -> None:
    commands = [_command("store"), _command("node_agent"), _command("node_agent")]

    found = with_settings(commands, [("node_agent", "prestarted_workers", "2")])

    assert [dict(command.environment) for command in found] == [
        {"STOKER_STORE_ADDRESS": "a"},
        {"STOKER_NODE_AGENT_ADDRESS": "a", "STOKER_NODE_AGENT_PRESTARTED_WORKERS": "2"},
        {"STOKER_NODE_AGENT_ADDRESS": "a", "STOKER_NODE_AGENT_PRESTARTED_WORKERS": "2"},
    ]


@pytest.mark.parametrize(
    ("service", "name", "message"),
    [("gateways", "x", "no service 'gateways'; known: store"), ("store", "address", "decides that itself")],
)
def test_settings_of_nobody_or_that_are_decided_are_refused(service: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings([_command("store")], [(service, name, "1")])


def _command(name: str) -> ServiceCommand:
    return service_command(name, {"ADDRESS": "a"}, health_address="a", log_dir=Path("logs"))

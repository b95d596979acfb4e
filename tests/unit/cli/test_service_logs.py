"""Which files `stoker logs SERVICE` prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stoker.cli.service_logs import find_logs
from stoker.errors import NotFound


def _written(path: Path, at_seconds: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (at_seconds, at_seconds))
    return path


def test_a_node_alone_has_its_logs_in_the_folder_itself(tmp_path: Path) -> None:
    path = _written(tmp_path / "store.log", 1)

    assert [(log.node_id, log.path) for log in find_logs(tmp_path, "store")] == [("", path)]


def test_of_several_nodes_each_ones_log_is_found_in_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        _written(tmp_path / f"node-{number}" / "store.log", number)
    _written(tmp_path / "workers" / "rep-1.log", 5)

    assert [log.node_id for log in find_logs(tmp_path, "store")] == ["node-1", "node-9", "node-10"]
    assert [log.node_id for log in find_logs(tmp_path, "store", node="node-9")] == ["node-9"]


@pytest.mark.parametrize(("alone_at", "nodes"), [(1, ["node-1", "node-2"]), (3, [""])])
def test_logs_of_an_earlier_run_with_another_number_of_nodes_are_not_shown(
    tmp_path: Path, alone_at: int, nodes: list[str]
) -> None:
    _written(tmp_path / "store.log", alone_at)
    for number in (1, 2):
        _written(tmp_path / f"node-{number}" / "store.log", number)

    assert [log.node_id for log in find_logs(tmp_path, "store")] == nodes


def test_what_has_no_log_is_an_error_that_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"no gateway.log in {tmp_path}.*--data"):
        find_logs(tmp_path, "gateway")
    _written(tmp_path / "node-1" / "store.log", 1)
    with pytest.raises(NotFound, match="on node 'node-7'; nodes: node-1"):
        find_logs(tmp_path, "store", node="node-7")

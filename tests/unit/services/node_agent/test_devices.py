"""Slots and memory, from what the host's tools print."""

from __future__ import annotations

import pytest

from services.node_agent.devices import parse_gpus, parse_memory, visible
from services.node_agent.workers.forked_child import describe_exit
from stoker.units import MIB

TWO = "0, 81559, NVIDIA H100 80GB HBM3\n1, 143771, NVIDIA H200\n"


def test_gpus_are_read_with_their_memory_and_name() -> None:
    first, second = parse_gpus(TWO)

    assert (first.index, first.kind, first.memory_bytes) == (0, "cuda", 81559 * MIB)
    assert (second.index, second.name) == (1, "NVIDIA H200")


@pytest.mark.parametrize("text", ["", "No devices were found\n", "0, [N/A], GPU\n"])
def test_what_is_no_gpu_is_none(text: str) -> None:
    assert parse_gpus(text) == ()


def test_cuda_visible_devices_selects_and_renumbers() -> None:
    gpus = parse_gpus(TWO)

    assert [gpu.name for gpu in visible(gpus, {})] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    only = visible(gpus, {"CUDA_VISIBLE_DEVICES": "1"})
    assert [(gpu.index, gpu.name) for gpu in only] == [(0, "NVIDIA H200")]
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_memory_is_read_in_bytes() -> None:
    memory = parse_memory("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n")

    assert (memory.total_bytes, memory.free_bytes) == (1_024_000, 409_600)


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exited with status 0"), (3, "exited with status 3"), (-9, "killed by SIGKILL")]
)
def test_an_exit_is_told_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text

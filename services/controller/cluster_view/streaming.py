"""Checkpoints that are larger than a store's pool, and what a start of one takes. Pure.

Stores and workers load them through a window of the pool (decision 0026). Rules:
1. Of the pool a start takes the window, until all weights are where they are used; nothing of the checkpoint
   stays there, so that no start finds it in memory and a prefetch would bring nothing.
2. On a device the copy is the device's memory, as always. On the processor each replica has a copy of its own
   in the host's memory, beside the pool, as long as it lives.
3. A store that names no window can't load one: such a checkpoint never fits its node.
4. One that is cut for several devices doesn't go through a window: its ranks read side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.controller.cluster_view.view import Device, Model, Node


def streams(model: Model, *, pool_bytes: int, window_bytes: int) -> bool:
    """Tell whether a checkpoint comes through a window of a pool of so many bytes (0 = not known)."""
    return 0 < pool_bytes < model.file_bytes and window_bytes > 0 and model.devices <= 1


def streams_on(model: Model, node: Node) -> bool:
    """Tell whether a checkpoint comes through a window of a node's pool."""
    return streams(model, pool_bytes=node.pool.total_bytes, window_bytes=node.pool.window_bytes)


def pool_bytes_on(model: Model, node: Node) -> int:
    """Return what a start of the model takes of a node's pool."""
    return node.pool.window_bytes if streams_on(model, node) else model.file_bytes


def has_own_memory(node: Node) -> bool:
    """Tell whether weights must be copied to a device; on a CPU the tensors are the pool's memory."""
    return any(device.kind != "cpu" for device in node.devices)


def copy_bytes_on(model: Model, node: Node) -> int:
    """Return what a replica takes of the host's memory beside the pool; 0 where it needs no copy there."""
    return own_copy_bytes(model) if streams_on(model, node) and not has_own_memory(node) else 0


def own_copy_bytes(model: Model) -> int:
    """Return what a replica on the processor needs beside the pool: a copy of all weights, and its cache."""
    return model.file_bytes + model.kv_cache_bytes


def host_bytes(devices: Iterable[Device]) -> int:
    """Return the memory of a host, which each of its CPU slots names; 0 = not known."""
    return max((device.memory_bytes for device in devices if device.kind == "cpu"), default=0)

"""The scenarios' language: a line is an event or an expectation, as README.md beside this file says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from services.controller.answer import Failed, Queued, Ready, Starting, Unknown
from services.controller.cluster_view.events import (
    Demanded,
    DemandEnded,
    Distrusted,
    ModelDeleted,
    ModelPut,
    NodeDisconnected,
    SchedulingSet,
    StopRefused,
)
from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Device, Held, Node, Phase, Pool, Scheduling, Stage
from services.controller.placement.deadline import late, late_if_started
from services.controller.scaling.foresight import Limits
from services.controller.scaling.rebalancing import RebalanceLimits
from stoker.ids import ModelName, NodeId, ReplicaId
from tests.scenarios.world import World, model

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1.0, "ms": 1e-3, "min": 60.0, "": 1.0}


class ScriptError(AssertionError):
    """A line that is no sentence, or an expectation that does not hold; names the line."""


def play(text: str) -> World:
    """Play a scenario to its end.

    Raises:
        ScriptError: An expectation does not hold, a decision was not expected, or a line has no meaning.
    """
    world = World()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        verb = SENTENCES.get(words[0])
        if verb is None:
            raise ScriptError(f"line {number}: {words[0]!r} is none of {', '.join(SENTENCES)}")
        if words[0] != "expect" and world.decisions:
            raise ScriptError(f"line {number}: decided and not expected: {world.decisions}")
        try:
            verb(world, words[1:])
        except ScriptError as error:
            raise ScriptError(f"line {number}: {line.strip()}: {error}") from None
    if world.decisions:
        raise ScriptError(f"at the end: decided and not expected: {world.decisions}")
    return world


def quantity(text: str) -> float:
    """Return `1.5GB`, `300ms`, `2min` or `7` as a number in bytes, seconds or as it is."""
    found = re.fullmatch(r"(-?[0-9.]+)([a-zA-Z]*)", text.removesuffix("/s") if "B/s" in text else text)
    if found is None or found[2] not in UNITS:
        raise ScriptError(f"{text!r} is no number with a known unit")
    return float(found[1]) * UNITS[found[2]]


def _settings(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) if "=" in word else (word, "") for word in words)


def _policy(world: World, words: list[str]) -> None:
    values = {key: quantity(value) for key, value in _settings(words).items()}
    world.policy = replace(world.policy, **values)


def _node(world: World, words: list[str]) -> None:
    settings = _settings(words[1:])
    node_id = NodeId(words[0])
    kind = "cuda" if "device_memory" in settings else "cpu"
    sizes = settings.get("device_memory") or settings.get("memory", "0")
    memory_bytes = [int(quantity(size)) for size in sizes.split(",")]
    in_memory, on_disk = (settings.get(tier, "").split(",") for tier in ("dram", "disk_holds"))
    held = {
        model.checkpoint: Held(
            dram_bytes=model.file_bytes * (model.name in in_memory),
            disk_bytes=model.file_bytes * (model.name in on_disk),
        )
        for model in world.view.models.values()
        if model.name in {*in_memory, *on_disk}
    }
    world.nodes[node_id] = Node(
        node_id=node_id,
        agent_address=f"{node_id}:7071",
        devices=tuple(
            Device(index=index, kind=kind, memory_bytes=memory_bytes[index % len(memory_bytes)])
            for index in range(int(settings.get("devices", "1")))
        ),
        held=held,
        stages={"disk": Stage(bytes_per_second=quantity(settings.get("disk", "1GB/s")))},
        pool=_pool(settings, sum(found.dram_bytes for found in held.values())),
        architectures=frozenset(filter(None, settings.get("architectures", "").split(","))),
        warm_workers=int(settings.get("warm", "1")),
        draining="draining" in settings,
        labels=_labels(settings.get("labels", "")),
    )
    world.report(node_id)


def _pool(settings: dict[str, str], held_bytes: int) -> Pool:
    total_bytes = int(quantity(settings.get("pool", "100GB")))
    window_bytes = int(quantity(settings.get("window", "0")))
    return Pool(total_bytes=total_bytes, free_bytes=total_bytes - held_bytes, window_bytes=window_bytes)


def _labels(text: str) -> frozenset[tuple[str, str]]:
    pairs = (word.partition(":") for word in text.split(",") if word)
    return frozenset((key, value) for key, _, value in pairs)


def _model(world: World, words: list[str]) -> None:
    settings = _settings(words[1:])
    before = world.view.models.get(ModelName(words[0]), model(words[0]))
    values: dict[str, Any] = {}
    if settings.get("keep_alive") == "auto":  # the one that was set before is the longest
        values["keep_alive_auto"] = True
        del settings["keep_alive"]
    for key, field, kind in MODEL_SETTINGS:
        if key in settings:
            values[field] = kind(settings[key])
    if "pinned" in settings:
        values["pinned"] = True
    if "size" in settings:
        values["weight_bytes"] = values["file_bytes"]
    world.apply(ModelPut(model=replace(before, **values)))


MODEL_SETTINGS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("size", "file_bytes", lambda text: int(quantity(text))),
    ("keep_alive", "keep_alive_seconds", quantity),
    ("min", "min_replicas", int),
    ("max", "max_replicas", int),
    ("concurrency", "concurrency", int),
    ("runtime", "runtime", str),
    ("architecture", "architecture", str),
    ("devices", "devices", int),
    ("require", "required_labels", _labels),
    ("prefer", "preferred_labels", _labels),
)


def _delete(world: World, words: list[str]) -> None:
    world.apply(ModelDeleted(name=ModelName(words[0])))


def _ask(world: World, words: list[str]) -> None:
    settings = _settings([word for word in words if "=" in word])
    waits = {f"{key}_seconds": quantity(value) for key, value in settings.items()}
    for name in (word for word in words if "=" not in word):
        world.apply(Demanded(model=ModelName(name), now_seconds=world.now_seconds, **waits))


def _history(world: World, words: list[str]) -> None:
    """Have a model been asked for at even intervals, the last time some seconds ago."""
    settings = _settings(words[1:])
    every, count = quantity(settings["every"]), int(settings.get("count", "12"))
    last_seconds = world.now_seconds - quantity(settings.get("ago", "0"))
    found: Arrivals | None = None
    for number in range(count):
        found = arrived(found, last_seconds - (count - 1 - number) * every)
    assert found is not None
    world.view = replace(world.view, arrivals={**world.view.arrivals, ModelName(words[0]): found})


def _foresee(world: World, words: list[str]) -> None:
    values: dict[str, Any] = {key: quantity(value) for key, value in _settings(words).items()}
    world.foresee(Limits(**{key: LIMIT_KINDS.get(key, float)(value) for key, value in values.items()}))


LIMIT_KINDS: dict[str, Callable[[float], float]] = {
    "worker_memory_bytes": int,
    "bytes_per_worker": int,
    "at_once": int,
}


def _rebalance(world: World, words: list[str]) -> None:
    values: dict[str, Any] = {key: quantity(value) for key, value in _settings(words).items()}
    kinds = {"sessions_per_node": int, "most_moves": int}
    world.rebalance(RebalanceLimits(**{key: kinds.get(key, float)(value) for key, value in values.items()}))


def _prefetched(world: World, words: list[str]) -> None:
    world.prefetched(ModelName(words[0]), NodeId(words[1]), failed="failed" in words[2:])


def _leave(world: World, words: list[str]) -> None:
    for name in words:
        world.apply(DemandEnded(model=ModelName(name)))


def _ready(world: World, words: list[str]) -> None:
    world.change_replica(
        ReplicaId(words[0]),
        phase=Phase.READY,
        idle_since_seconds=world.now_seconds,
        sessions=0,
        loading="loading" in words[1:],
    )


def _sessions(world: World, words: list[str]) -> None:
    count = int(words[1])
    idle_since_seconds = None if count else world.now_seconds
    waiting = int(_settings(words[2:]).get("waiting", "0"))
    longest = _settings(words[2:]).get("longest")
    world.change_replica(
        ReplicaId(words[0]),
        sessions=count,
        idle_since_seconds=idle_since_seconds,
        waiting_sessions=waiting,
        longest_since_seconds=world.now_seconds - quantity(longest) if longest else None,
        context_tokens=int(_settings(words[2:]).get("tokens", "0")),
    )


def _fails(world: World, words: list[str]) -> None:
    world.change_replica(
        ReplicaId(words[0]),
        phase=Phase.FAILED,
        idle_since_seconds=None,
        error_code=words[1],
        error_message=" ".join(words[2:]),
    )


def _stopped(world: World, words: list[str]) -> None:
    world.remove_replica(ReplicaId(words[0]))


def _busy(world: World, words: list[str]) -> None:
    world.apply(StopRefused(replica_id=ReplicaId(words[0]), busy=True))


def _broken(world: World, words: list[str]) -> None:
    world.apply(Distrusted(replica_ids=frozenset(map(ReplicaId, words))))


def _silent(world: World, words: list[str]) -> None:
    world.silent.add(NodeId(words[0]))
    world.apply(NodeDisconnected(node_id=NodeId(words[0])))


def _back(world: World, words: list[str]) -> None:
    world.silent.discard(NodeId(words[0]))
    world.report(NodeId(words[0]))


def _drain(world: World, words: list[str]) -> None:
    world.change_node(NodeId(words[0]), draining=True)


def _schedule(world: World, words: list[str]) -> None:
    world.apply(SchedulingSet(node_id=NodeId(words[0]), scheduling=Scheduling(words[1])))


def _wait(world: World, words: list[str]) -> None:
    world.wait(quantity(words[0]))


def _restart(world: World, words: list[str]) -> None:
    del words
    world.silent |= set(world.nodes)
    world.restart_controller()


def _expect(world: World, words: list[str]) -> None:
    if words == ["nothing"]:
        if world.decisions:
            raise ScriptError(f"decided {world.decisions}")
        return
    if words[0] in world.view.models or words[0] == "unknown":
        _expect_answer(world, ModelName(words[0]), words[1], " ".join(words[2:]))
        return
    expected = " ".join(words)
    if not world.decisions:
        raise ScriptError("nothing was decided")
    decided = world.decisions.pop(0)
    is_whole = words[0] == "prefetch"  # or it would not show what else is dropped
    if decided != expected if is_whole else not decided.startswith(expected):
        raise ScriptError(f"decided {decided!r}")


def _expect_answer(world: World, name: ModelName, kind: str, text: str) -> None:
    found = world.answer(name)
    if kind in {"meets", "misses"}:
        due_seconds = world.now_seconds + quantity(text)
        found_late = late(found, now_seconds=world.now_seconds, due_seconds=due_seconds) or late_if_started(
            world.view,
            name,
            found,
            now_seconds=world.now_seconds,
            due_seconds=due_seconds,
            policy=world.policy,
        )
        if (found_late is not None) != (kind == "misses"):
            raise ScriptError(f"a request due in {text} is told {found_late}")
        return
    said = {Ready: "ready", Starting: "starting", Queued: "queued", Failed: "fails", Unknown: "unknown"}
    why = ""
    match found:
        case Ready(member=member) | Starting(member=member):
            why = member.reservation.replica_id
        case Queued(reason=reason):
            why = reason
        case Failed(code=code, message=message):
            why = f"{code}: {message}"
    if said[type(found)] != kind or text not in why:
        raise ScriptError(f"a request is told {said[type(found)]} {why!r}")


SENTENCES: dict[str, Callable[[World, list[str]], None]] = {
    "policy": _policy,
    "node": _node,
    "model": _model,
    "delete": _delete,
    "ask": _ask,
    "leave": _leave,
    "history": _history,
    "foresee": _foresee,
    "prefetched": _prefetched,
    "rebalance": _rebalance,
    "ready": _ready,
    "sessions": _sessions,
    "fails": _fails,
    "stopped": _stopped,
    "busy": _busy,
    "broken": _broken,
    "silent": _silent,
    "back": _back,
    "drain": _drain,
    "schedule": _schedule,
    "wait": _wait,
    "restart": _restart,
    "expect": _expect,
}

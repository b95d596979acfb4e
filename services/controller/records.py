"""What the controller keeps in the state store: keys and versioned JSON. Pure.

| key | value | written |
| --- | --- | --- |
| `leader` | address of the leading controller; on its lease | by the election |
| `models/<name>` | `ModelRecord` | deploy, delete |
| `reservations/<replica id>` | `ReservationRecord` | with its device keys, in one transaction |
| `nodes/<node id>` | `{"scheduling": "cordoned"}` or `"drained"`; no key = open | by an operator |
| `devices/<node id>/<index>` | the replica id that may occupy the slot | compared with *absent*: one owner |

Every value but the plain ids carries `"version"`. A reader accepts its own version and ignores fields it does
not know, so that old and new controllers can follow each other during an upgrade.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from services.controller.cluster_view.view import Scheduling
from stoker.errors import ConfigError
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.v1 import model_pb2

LEADER_KEY = "leader"
MODELS = "models/"
RESERVATIONS = "reservations/"
DEVICES = "devices/"
NODES = "nodes/"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A deployed model.

    Attributes:
        spec: As deployed, defaults filled in; not to be changed in place.
        checkpoint: As some node's store described it when it was deployed.
        generation: 1 at first, raised by every change.
        created_unix_seconds: When it was deployed first.
        mod_revision: The state's revision of the record; what the next write compares.
    """

    spec: model_pb2.ModelSpec
    checkpoint: model_pb2.CheckpointInfo
    generation: int
    created_unix_seconds: float
    mod_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRecord:
    """The right of a replica to occupy device slots of a node; see `view.Reservation`."""

    replica_id: ReplicaId
    model: ModelName
    node_id: NodeId
    devices: tuple[int, ...]
    runtime: str
    predicted_seconds: float
    created_unix_seconds: float


def model_key(name: str) -> str:
    """Return a model's key."""
    return f"{MODELS}{name}"


def reservation_key(replica_id: str) -> str:
    """Return a reservation's key."""
    return f"{RESERVATIONS}{replica_id}"


def node_key(node_id: str) -> str:
    """Return the key of what an operator wants of a node."""
    return f"{NODES}{node_id}"


def encode_scheduling(scheduling: Scheduling) -> bytes:
    """Return what an operator wants of a node as it is stored."""
    return _encode({"scheduling": scheduling.value})


def decode_scheduling(key: str, raw: bytes) -> Scheduling:
    """Return what an operator wants of the node stored at `key`.

    Raises:
        ConfigError: It is not such a record, or of a version this controller does not know.
    """
    fields = _decode(key, raw)
    try:
        return Scheduling(fields["scheduling"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"state key {key} is no scheduling: {error!r}; restore or delete it") from error


def device_key(node_id: str, index: int) -> str:
    """Return a device slot's key."""
    return f"{DEVICES}{node_id}/{index}"


def encode_model(record: ModelRecord) -> bytes:
    """Return the record as it is stored."""
    return _encode(
        {
            "spec": json_format.MessageToDict(record.spec, preserving_proto_field_name=True),
            "checkpoint": json_format.MessageToDict(record.checkpoint, preserving_proto_field_name=True),
            "generation": record.generation,
            "created_unix_seconds": record.created_unix_seconds,
        }
    )


def decode_model(key: str, raw: bytes, mod_revision: int) -> ModelRecord:
    """Return the record stored at `key`.

    Raises:
        ConfigError: It is not such a record, or of a version this controller does not know.
    """
    fields = _decode(key, raw)
    try:
        return ModelRecord(
            spec=json_format.ParseDict(fields["spec"], model_pb2.ModelSpec(), ignore_unknown_fields=True),
            checkpoint=json_format.ParseDict(
                fields["checkpoint"], model_pb2.CheckpointInfo(), ignore_unknown_fields=True
            ),
            generation=int(fields["generation"]),
            created_unix_seconds=float(fields["created_unix_seconds"]),
            mod_revision=mod_revision,
        )
    except (KeyError, TypeError, ValueError, json_format.ParseError) as error:
        raise ConfigError(
            f"state key {key} is not a model record: {error!r}; restore or delete it"
        ) from error


def encode_reservation(record: ReservationRecord) -> bytes:
    """Return the record as it is stored."""
    return _encode(
        {
            "replica_id": record.replica_id,
            "model": record.model,
            "node_id": record.node_id,
            "devices": list(record.devices),
            "runtime": record.runtime,
            "predicted_seconds": record.predicted_seconds,
            "created_unix_seconds": record.created_unix_seconds,
        }
    )


def decode_reservation(key: str, raw: bytes) -> ReservationRecord:
    """Return the record stored at `key`.

    Raises:
        ConfigError: It is not such a record, or of a version this controller does not know.
    """
    fields = _decode(key, raw)
    try:
        return ReservationRecord(
            replica_id=ReplicaId(fields["replica_id"]),
            model=ModelName(fields["model"]),
            node_id=NodeId(fields["node_id"]),
            devices=tuple(int(index) for index in fields["devices"]),
            runtime=str(fields["runtime"]),
            predicted_seconds=float(fields["predicted_seconds"]),
            created_unix_seconds=float(fields["created_unix_seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"state key {key} is not a reservation: {error!r}; restore or delete it") from error


def _encode(fields: dict[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **fields}, separators=(",", ":"), sort_keys=True).encode()


def _decode(key: str, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"state key {key} is not JSON: {error}; restore or delete it") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise ConfigError(
            f"state key {key} has version {version!r}, this controller knows {VERSION}: upgrade it"
        )
    return dict(fields)

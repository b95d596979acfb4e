"""Records: what is written is read again, and what cannot be read is said so."""

from __future__ import annotations

import json

import pytest

from services.controller.records import (
    ModelRecord,
    ReservationRecord,
    decode_model,
    decode_reservation,
    encode_model,
    encode_reservation,
)
from stoker.errors import ConfigError
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.v1 import model_pb2

MODEL = ModelRecord(
    spec=model_pb2.ModelSpec(name="m", keep_alive_seconds=0, max_replicas=2, labels={"team": "x"}),
    checkpoint=model_pb2.CheckpointInfo(uri="/m", file_bytes=2**40),
    generation=3,
    created_unix_seconds=12.5,
    mod_revision=7,
)
RESERVATION = ReservationRecord(
    replica_id=ReplicaId("rep-1"),
    model=ModelName("m"),
    node_id=NodeId("a"),
    devices=(0, 3),
    runtime="v1",
    predicted_seconds=1.5,
    created_unix_seconds=12.5,
)


def test_records_are_read_as_they_were_written() -> None:
    assert decode_model("models/m", encode_model(MODEL), 7) == MODEL
    assert decode_reservation("reservations/rep-1", encode_reservation(RESERVATION)) == RESERVATION


def test_a_keep_alive_of_zero_survives_and_stays_set() -> None:
    assert decode_model("models/m", encode_model(MODEL), 7).spec.HasField("keep_alive_seconds")


def test_fields_of_a_newer_controller_are_ignored() -> None:
    fields = json.loads(encode_model(MODEL))
    fields["spec"]["invented_later"] = 1
    fields["also_new"] = {}

    assert decode_model("models/m", json.dumps(fields).encode(), 7) == MODEL


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b'{"version": 2}', b'{"version": 1}'])
def test_what_is_no_record_is_refused_by_its_key(raw: bytes) -> None:
    with pytest.raises(ConfigError, match="models/m"):
        decode_model("models/m", raw, 1)
    with pytest.raises(ConfigError, match="reservations/r"):
        decode_reservation("reservations/r", raw)

"""The controller's writes: every one fenced by its term, every reservation a compare-and-swap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.controller.cluster_view.view import Scheduling
from services.controller.records import (
    DEVICES,
    MODELS,
    NODES,
    RESERVATIONS,
    ModelRecord,
    ReservationRecord,
    decode_model,
    decode_reservation,
    decode_scheduling,
    device_key,
    encode_model,
    encode_reservation,
    encode_scheduling,
    model_key,
    node_key,
    reservation_key,
)
from stoker.errors import PeerError
from stoker.ids import NodeId, ReplicaId
from stoker.state import (
    Compare,
    Conflict,
    Delete,
    ModRevisionIs,
    Put,
    ValueIs,
    Write,
    absent,
)
from stoker.state.election import FencedState


class StateDisagrees(PeerError):
    """The state is not what this controller believed: it must read it anew before it decides again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Everything a new leader reads."""

    models: tuple[ModelRecord, ...]
    reservations: tuple[ReservationRecord, ...]
    scheduling: Mapping[NodeId, Scheduling]


class Ledger:
    """Reads and writes of one term; `fenced.leader.term` is the fence its orders carry."""

    def __init__(self, fenced: FencedState) -> None:
        self._fenced = fenced
        self._reservations: dict[ReplicaId, ReservationRecord] = {}

    @property
    def fence(self) -> int:
        """The election revision of this term."""
        return self._fenced.leader.term

    async def read(self) -> Recorded:
        """Read all records, and delete device keys that belong to no reservation.

        Raises:
            ConfigError: A record cannot be read; the operator must act.
            StateUnavailable: The state did not answer.
            Fenced: This controller no longer leads.
        """
        store = self._fenced.store
        models = [
            decode_model(item.key, item.value, item.mod_revision) for item in (await store.list(MODELS)).items
        ]
        reservations = [
            decode_reservation(item.key, item.value) for item in (await store.list(RESERVATIONS)).items
        ]
        self._reservations = {record.replica_id: record for record in reservations}
        for item in (await store.list(DEVICES)).items:
            if ReplicaId(item.value.decode()) not in self._reservations:
                await self._write([ValueIs(key=item.key, value=item.value)], [Delete(key=item.key)])
        scheduling = {
            NodeId(item.key.removeprefix(NODES)): decode_scheduling(item.key, item.value)
            for item in (await store.list(NODES)).items
        }
        return Recorded(models=tuple(models), reservations=tuple(reservations), scheduling=scheduling)

    async def reserve(self, record: ReservationRecord) -> None:
        """Write a reservation, if all its device slots are free.

        Raises:
            StateDisagrees: A slot is taken.
            StateUnavailable: No answer; it may have been written or not.
            Fenced: This controller no longer leads.
        """
        slots = [device_key(record.node_id, index) for index in record.devices]
        key = reservation_key(record.replica_id)
        await self._write(
            [absent(key), *(absent(slot) for slot in slots)],
            [
                Put(key=key, value=encode_reservation(record)),
                *(Put(key=slot, value=record.replica_id.encode()) for slot in slots),
            ],
        )
        self._reservations[record.replica_id] = record

    async def release(self, replica_id: ReplicaId) -> None:
        """Delete a reservation and free its slots; nothing happens where there is none.

        Raises:
            StateDisagrees: A slot belongs to somebody else.
            StateUnavailable: No answer; it may have been deleted or not.
            Fenced: This controller no longer leads.
        """
        record = self._reservations.get(replica_id)
        if record is None:
            return
        slots = [device_key(record.node_id, index) for index in record.devices]
        await self._write(
            [ValueIs(key=slot, value=replica_id.encode()) for slot in slots],
            [Delete(key=reservation_key(replica_id)), *(Delete(key=slot) for slot in slots)],
        )
        self._reservations.pop(replica_id, None)

    async def set_scheduling(self, node_id: NodeId, scheduling: Scheduling) -> None:
        """Write what an operator wants of a node.

        Raises:
            StateUnavailable: No answer; it may have been written or not.
            Fenced: This controller no longer leads.
        """
        key = node_key(node_id)
        write: Write = (
            Delete(key=key)
            if scheduling is Scheduling.OPEN
            else Put(key=key, value=encode_scheduling(scheduling))
        )
        await self._write([], [write])

    async def put_model(self, record: ModelRecord) -> ModelRecord:
        """Write a model record over the revision it was made from; returns it with its new revision.

        Raises:
            StateDisagrees: It was changed meanwhile.
            StateUnavailable: No answer; it may have been written or not.
            Fenced: This controller no longer leads.
        """
        key = model_key(record.spec.name)
        revision = await self._write(
            [ModRevisionIs(key=key, revision=record.mod_revision)], [Put(key=key, value=encode_model(record))]
        )
        return replace(record, mod_revision=revision)

    async def delete_model(self, record: ModelRecord) -> None:
        """Delete a model record.

        Raises:
            StateDisagrees: It was changed meanwhile.
            StateUnavailable: No answer; it may have been deleted or not.
            Fenced: This controller no longer leads.
        """
        key = model_key(record.spec.name)
        await self._write([ModRevisionIs(key=key, revision=record.mod_revision)], [Delete(key=key)])

    async def _write(self, compares: list[Compare], writes: list[Write]) -> int:
        outcome = await self._fenced.transact(compares, writes)
        if isinstance(outcome, Conflict):
            keys = ", ".join(sorted({compare.key for compare in outcome.failed}))
            raise StateDisagrees(
                f"state keys {keys} are not as this controller knew them; it reads them anew"
            )
        return outcome.revision

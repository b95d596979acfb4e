"""Deploying and deleting models: checked, described by a store, written, then taken over into the view."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from services.controller.adapters import check_adapters, described
from services.controller.answer import near_names
from services.controller.cluster import Cluster
from services.controller.cluster_view.view import Node
from services.controller.records import ModelRecord
from services.controller.settings import ControllerSettings
from services.controller.specs import check_architecture, on_devices, resolve
from stoker.errors import AlreadyExists, CapacityError, ModelNotFound, PeerError
from stoker.ids import ModelName
from stoker.v1 import model_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What a deployment came to."""

    record: ModelRecord
    created: bool
    changed: bool


class Registry:
    """The models of one term; changes to them happen one at a time."""

    def __init__(self, cluster: Cluster, settings: ControllerSettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._writing = asyncio.Lock()

    async def deploy(
        self, spec: model_pb2.ModelSpec, *, create_only: bool, dry_run: bool = False
    ) -> Deployed:
        """Create a model, or change it when it exists; with `dry_run` check all and write nothing.

        Raises:
            InvalidRequest: The description is not sound.
            CheckpointInvalid: The checkpoint can't be read, or no engine serves it.
            AlreadyExists: It exists, and `create_only`.
            CapacityError: As many models as this controller takes are deployed.
            PeerError: No node has joined, so nobody can read the checkpoint; or the store failed.
        """
        full = resolve(spec, self._settings)
        name = ModelName(full.name)
        self._check_new(name, create_only=create_only)
        checkpoint = await self._describe(full)
        full = on_devices(full, checkpoint)
        if full.adapters:
            full = await self._with_adapters(full)
        async with self._writing:
            before = self._check_new(name, create_only=create_only)
            if before is not None and (before.spec, before.checkpoint) == (full, checkpoint):
                return Deployed(record=before, created=False, changed=False)
            record = (
                replace(before, spec=full, checkpoint=checkpoint, generation=before.generation + 1)
                if before is not None
                else ModelRecord(
                    spec=full,
                    checkpoint=checkpoint,
                    generation=1,
                    created_unix_seconds=self._cluster.clock.unix_seconds(),
                )
            )
            if dry_run:
                return Deployed(record=record, created=before is None, changed=True)
            record = await self._cluster.ledger.put_model(record)
            self._cluster.put_record(record)
        self._cluster.tell(
            "model.deployed",
            model=name,
            generation=record.generation,
            checkpoint_uri=checkpoint.uri,
            revision=checkpoint.revision,
            file_bytes=checkpoint.file_bytes,
        )
        return Deployed(record=record, created=before is None, changed=True)

    async def delete(self, name: ModelName) -> None:
        """Delete a model; its replicas are drained and stopped.

        Raises:
            ModelNotFound: No such model.
        """
        async with self._writing:
            record = self._cluster.records.get(name)
            if record is None:
                raise model_not_found(name, near_names(name, self._cluster.records.keys()))
            await self._cluster.ledger.delete_model(record)
            self._cluster.drop_record(name)
        self._cluster.tell("model.deleted", model=name)

    def _check_new(self, name: ModelName, *, create_only: bool) -> ModelRecord | None:
        before = self._cluster.records.get(name)
        if before is not None and create_only:
            raise AlreadyExists(
                f"model {name} is deployed already; deploy it without create_only to change it"
            )
        if before is None and len(self._cluster.records) >= self._settings.max_models:
            raise CapacityError(f"{len(self._cluster.records)} models are deployed, this controller's limit")
        return before

    async def _describe(self, spec: model_pb2.ModelSpec) -> model_pb2.CheckpointInfo:
        orders, uri = self._cluster.orders, spec.checkpoint_uri
        checkpoint = await self._ask(spec, lambda address: orders.describe(address, uri))
        served = {architecture for node in self._nodes(spec) for architecture in node.architectures}
        check_architecture(checkpoint, served)
        return checkpoint

    async def _with_adapters(self, spec: model_pb2.ModelSpec) -> model_pb2.ModelSpec:
        check_adapters(spec)
        orders, base = self._cluster.orders, spec.checkpoint_uri

        async def ask(uri: str) -> model_pb2.AdapterSpec:
            return await self._ask(spec, lambda address: orders.describe_adapter(address, uri, base))

        return await described(spec, ask)

    async def _ask(self, spec: model_pb2.ModelSpec, call: Callable[[str], Awaitable[T]]) -> T:
        """Return what the first store that is there answers."""
        nodes = self._nodes(spec)
        for node in nodes[:-1]:
            with suppress(PeerError):  # that store is not there; another one may be
                return await call(node.store_address)
        return await call(nodes[-1].store_address)

    def _nodes(self, spec: model_pb2.ModelSpec) -> list[Node]:
        """Return the nodes whose stores can be asked.

        Raises:
            PeerError: There is none.
        """
        nodes = [node for node in self._cluster.view.nodes.values() if node.connected and node.store_address]
        if not nodes:
            raise PeerError(
                f"model {spec.name} can't be checked: no node has joined yet; start a node agent",
                retry_after_seconds=1.0,
            )
        return sorted(nodes, key=lambda node: node.node_id)


def model_not_found(name: str, near: tuple[str, ...]) -> ModelNotFound:
    """Return the error that names what the caller may have meant."""
    hint = f"; did you mean {' or '.join(near)}?" if near else "; list the deployed ones with `stoker ls`"
    return ModelNotFound(
        f"model {name[:140]!r} is not deployed{hint}", param="model", details={"near": list(near)}
    )

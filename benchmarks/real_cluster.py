"""A real cluster of several nodes on this host with slow disks, and cold starts of small models on it."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from setting import ROOT, cluster, until_cold
from small_models import make_small_model

from stoker.client import AsyncClient
from stoker.errors import StokerError
from stoker.rpc import connect, translated
from stoker.v1 import checkpoint_store_pb2 as store_pb
from stoker.v1 import controller_pb2, model_pb2, node_agent_pb2, start_pb2
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub

sys.path.insert(0, str(ROOT))
from tests.integration.store.origin_server import origin_server

KEEP_ALIVE_SECONDS = 0.2
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The cluster.

    Attributes:
        nodes: How many.
        devices: Declared ones of each.
        disk_bytes_per_second: Of each node's disk.
        network_bytes_per_second: Of each node's reads from others and from the shared folder.
        pool_bytes: Of each node's store.
    """

    nodes: int = 4
    devices: int = 2
    disk_bytes_per_second: float = 40e6
    network_bytes_per_second: float = 60e6
    pool_bytes: int = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeModel:
    """A random model that was made for this run."""

    name: str
    uri: str
    weight_bytes: int
    far: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start that came to its end, as the controller explains it.

    Attributes:
        model: Which.
        node_id: Where.
        kind: What was asked of it, e.g. `disk`.
        predicted: The option that won, by stage.
        measured: What its node reported.
    """

    model: str
    node_id: str
    kind: str
    predicted: controller_pb2.ExplainedOption
    measured: start_pb2.StartTimings

    @property
    def predicted_seconds(self) -> float:
        """From the decision until it can serve, all weights there."""
        return self.predicted.total_seconds

    @property
    def measured_seconds(self) -> float:
        """The same span."""
        return self.measured.total_seconds

    @property
    def error_ratio(self) -> float:
        """|predicted - measured| / measured."""
        return abs(self.predicted_seconds - self.measured_seconds) / self.measured_seconds


@dataclass(slots=True)
class RealCluster:
    """A running cluster, its models, and what its starts came to."""

    admin: AsyncClient
    models: Sequence[MadeModel]
    starts: list[Start] = field(default_factory=list)

    async def start(self, model: MadeModel, kind: str) -> Start:
        """Ask a cold model for one token, and return what its start was predicted to take and took."""
        before = {decision.replica_id for decision in await self._decisions(model)}
        async for _ in self.admin.complete(model.name, "the", max_tokens=1, timeout_seconds=PATIENCE_SECONDS):
            pass
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                for decision in await self._decisions(model):
                    if decision.outcome == "ready" and decision.replica_id not in before:
                        return self._take(model, kind, decision)
                await asyncio.sleep(POLL_SECONDS)

    def _take(self, model: MadeModel, kind: str, decision: controller_pb2.ExplainedDecision) -> Start:
        found = Start(
            model=model.name,
            node_id=decision.options[0].node_id,
            kind=kind,
            predicted=decision.options[0],
            measured=decision.measured,
        )
        self.starts.append(found)
        return found

    async def _decisions(self, model: MadeModel) -> Sequence[controller_pb2.ExplainedDecision]:
        return [found for found in await self.admin.explain(model.name, limit=100) if found.replica_id]

    async def until_quiet(self) -> None:
        """Wait until nothing runs and every node that takes replicas has a pre-started worker."""
        await until_cold(self.admin)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not all(report.warm_workers for report in await self._reports()):  # noqa: ASYNC110 - a benchmark
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise SystemExit(
                f"a node had no pre-started worker within {PATIENCE_SECONDS:g} s: is the machine busy?"
            ) from None

    async def drop(self, model: MadeModel, *, copies: bool = False) -> None:
        """Drop a cold model from every node's memory, and with `copies` from their disk caches, too."""
        await until_cold(self.admin)
        for report in await self._reports():
            async with connect(report.store_address) as channel:
                stub = CheckpointStoreStub(channel)
                await _unless_absent(stub.Evict(store_pb.EvictRequest(uri=model.uri)))
                if copies and model.far:
                    await _unless_absent(stub.EvictCopy(store_pb.EvictCopyRequest(uri=model.uri)))
        await self._until_told(model)

    async def only(self, allowed: Sequence[str]) -> None:
        """Have only these nodes take replicas; none = all."""
        for report in await self._reports():
            is_open = not allowed or report.node_id in allowed
            scheduling = (
                controller_pb2.NODE_SCHEDULING_OPEN if is_open else controller_pb2.NODE_SCHEDULING_CORDONED
            )
            await self.admin.set_node_scheduling(report.node_id, scheduling)

    async def node_ids(self) -> list[str]:
        """Return the nodes' names."""
        return sorted(report.node_id for report in await self._reports())

    async def _until_told(self, model: MadeModel) -> None:
        """Wait until the controller knows that nobody has it in memory."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(  # noqa: ASYNC110 - a benchmark
                held.checkpoint.uri == model.uri and held.dram_bytes
                for report in await self._reports()
                for held in report.store.checkpoints
            ):
                await asyncio.sleep(POLL_SECONDS)

    async def _reports(self) -> list[node_agent_pb2.NodeReport]:
        return [node.report for node in await self.admin.nodes()]


async def _unless_absent(call: object) -> None:
    try:
        with translated("store"):
            await call  # type: ignore[misc]
    except StokerError as error:
        if error.code != "not_found":
            raise


@asynccontextmanager
async def real_cluster(
    name: str,
    shape: Shape,
    *,
    local: Sequence[int],
    far: Sequence[int],
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
) -> AsyncIterator[RealCluster]:
    """Run a cluster with models of these sizes, in MB: on its hosts' disk, and behind an HTTP origin each."""
    shutil.rmtree(ROOT / ".data" / f"bench-{name}", ignore_errors=True)
    options = {
        "node_count": shape.nodes,
        "devices": shape.devices,
        "pool_bytes": shape.pool_bytes,
        "disk_bytes_per_second": shape.disk_bytes_per_second,
        "network_bytes_per_second": shape.network_bytes_per_second,
    }
    with tempfile.TemporaryDirectory(prefix="stoker-models-") as folder, ExitStack() as origins:
        models = [
            _made(Path(folder), f"local-{megabytes}-{at}", megabytes) for at, megabytes in enumerate(local)
        ]
        for at, megabytes in enumerate(far):
            made = _made(Path(folder), f"far-{megabytes}-{at}", megabytes)
            url = origins.enter_context(origin_server(Path(made.uri))).url
            models.append(replace(made, uri=url, far=True))
        async with cluster(name, **options) as (_, admin):
            for model in models:
                await admin.deploy(
                    model_pb2.ModelSpec(
                        name=model.name, checkpoint_uri=model.uri, keep_alive_seconds=keep_alive_seconds
                    )
                )
            yield RealCluster(admin, models)


def _made(folder: Path, name: str, megabytes: int) -> MadeModel:
    weight_bytes = make_small_model(folder / name, megabytes=megabytes, seed=len(name) + megabytes)
    return MadeModel(name=name, uri=str(folder / name), weight_bytes=weight_bytes, far=False)

"""What the store says, as messages: chunk maps, progress, status. No I/O."""

from __future__ import annotations

from services.store.catalog import CatalogEntry
from services.store.loads import Loads
from services.store.origins.source import REMOTE
from services.store.pool.resident import Phase, Resident
from services.store.pool.window import window_chunks
from services.store.reading.bandwidth import Moved
from services.store.reading.lanes import Lane
from services.store.reading.read_queue import Urgency
from stoker.attach.columns import Tensor, columns_of, message_of
from stoker.checkpoint.index import check_rank
from stoker.checkpoint.reading import DISK
from stoker.errors import StokerError
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1 import start_pb2

DRAM = "dram"
_QUEUES = {DISK: Lane.DISK, REMOTE: Lane.FAR}
"""Where the bytes of a tier wait; what waits for peers and origins alike is told of the origin."""


def urgency_of(priority: pb.Priority.ValueType) -> Urgency:
    """Return what a request's priority means."""
    return Urgency.PREFETCH if priority == pb.PRIORITY_PREFETCH else Urgency.DEMAND


def files_of(entry: CatalogEntry, rank: int | None) -> range:
    """Return the numbers of the files that a rank uses; all of them where the checkpoint is in one piece.

    Raises:
        CheckpointInvalid, InvalidRequest: As `check_rank`.
    """
    check_rank(entry.index.path, rank, entry.index.ranks)
    if rank is None or entry.index.ranks == 1:
        return range(len(entry.index.files))
    return range(rank, rank + 1)


def attach_reply(
    loads: Loads, resident: Resident, files: range, *, tier: str, columns: bool = False
) -> bytes:
    """Return the serialised first reply to an attach.

    The big part, the tensor table, is the same for every attach and load and kept with the catalog's entry;
    what differs is appended: protobuf merges a message field that comes twice. Ranks have their own tables.

    Args:
        loads: Where the resident is.
        resident: Has its chunks.
        files: See `files_of`.
        tier: The best one that held all of it when it was asked for.
        columns: The client reads the tensor table by columns.
    """
    tables, kind = resident.entry.attach_tables, (files, columns)
    if kind not in tables:
        table = _table(resident.entry, files, columns=columns)
        tables[kind] = pb.AttachReply(attached=table).SerializeToString()
    chunks = _chunks(loads, resident, files, tier=tier)
    return tables[kind] + pb.AttachReply(attached=chunks).SerializeToString()


def _chunks(loads: Loads, resident: Resident, files: range, *, tier: str) -> pb.Attached:
    """Return where a load's files lie in the pool."""
    return pb.Attached(
        arena_bytes=loads.arena.total_bytes,
        chunk_bytes=loads.arena.chunk_bytes,
        files=[
            pb.AttachedFile(
                name=described.name,
                bytes=described.size_bytes,
                chunk_offsets=[loads.arena.offset(chunk) for chunk in file.chunks],
                ready_counter_offset=loads.counters.offset(file.slot),
            )
            for described, file in ((resident.entry.index.files[at], resident.files[at]) for at in files)
        ],
        window_bytes=0 if resident.window is None else resident.window.bytes,
        tier=tier,
    )


def _table(entry: CatalogEntry, files: range, *, columns: bool) -> pb.Attached:
    """Return what is in a checkpoint's files, wherever they lie."""
    number = {entry.index.files[index].name: at for at, index in enumerate(files)}
    tensors = [
        Tensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=number[tensor.file],
            offset=tensor.offset,
            nbytes=tensor.nbytes,
            layer=tensor.layer,
        )
        for tensor in entry.tensors
        if tensor.file in number
    ]
    return pb.Attached(
        checkpoint=entry.info,
        columns=columns_of(tensors) if columns else None,
        tensors=[] if columns else map(message_of, tensors),
        small_files=[
            pb.SmallFile(name=name, content=content, last=True)
            for name, content in entry.attached_files.items()
        ],
        tied=[pb.TiedTensors(names=group) for group in entry.index.tied_groups],
    )


def ready_messages(resident: Resident, files: range, told: list[int]) -> list[pb.AttachProgress]:
    """Return a message per file of `files` that got further than `told` says, and note it there."""
    messages = []
    for number, file in enumerate(resident.files[files.start : files.stop]):
        if file.ready_bytes != told[number]:
            told[number] = file.ready_bytes
            ready = pb.FileReady(file=number, bytes=file.ready_bytes)
            messages.append(pb.AttachProgress(file_ready=ready))
    return messages


def done_message(resident: Resident, *, warm_seconds: float | None) -> pb.AttachDone:
    """Return how the checkpoint came; `warm_seconds` is what the attach took when all of it was there."""
    if warm_seconds is None:
        return pb.AttachDone(transfers=transfers(resident.moved), seconds=resident.seconds)
    byte_count = sum(file.size_bytes for file in resident.files)
    from_dram = start_pb2.TierTransfer(tier=DRAM, bytes=byte_count, seconds=warm_seconds)
    return pb.AttachDone(transfers=[from_dram], seconds=warm_seconds)


def transfers(moved: tuple[Moved, ...]) -> list[start_pb2.TierTransfer]:
    """Return what each tier moved."""
    return [
        start_pb2.TierTransfer(tier=each.tier, bytes=each.byte_count, seconds=each.seconds) for each in moved
    ]


def failed_message(error: StokerError) -> pb.AttachFailed:
    """Return an error as it travels over the attach socket."""
    return pb.AttachFailed(code=error.code, message=error.message)


def store_status(loads: Loads, entries: list[CatalogEntry]) -> pb.StoreStatus:
    """Return what the store holds and how fast its tiers are.

    Args:
        loads: The pool.
        entries: Checkpoints known on this host, also those that are not in the pool.
    """
    arena = loads.arena
    residents = loads.residents()
    in_pool = {resident.entry.uri for resident in residents}
    known = [_not_in_pool(loads, entry) for entry in entries if entry.uri not in in_pool]
    return pb.StoreStatus(
        pool=pb.PoolStatus(
            total_bytes=arena.total_bytes,
            free_bytes=loads.free_bytes(),
            leased_bytes=loads.leased_bytes(),
            chunk_bytes=arena.chunk_bytes,
            page_bytes=arena.page_bytes,
            backing=arena.backing,
            window_bytes=_window_bytes(loads),
        ),
        checkpoints=[_in_pool(loads, resident) for resident in residents] + known,
        bandwidths=[
            pb.Bandwidth(
                stage=tier,
                bytes_per_second=loads.transfers.rates.bytes_per_second(tier) or 0.0,
                queued_bytes=loads.transfers.waiting_bytes(_QUEUES[tier]) if tier in _QUEUES else 0,
            )
            for tier in loads.transfers.rates.tiers()
        ],
    )


def _window_bytes(loads: Loads) -> int:
    """Return what a checkpoint that is larger than the pool takes of it; 0: the pool is too small for one.

    One whose digests cover several chunks of the pool may take more.
    """
    chunks = window_chunks(total_chunks=loads.chunks.total, step_chunks=1)
    return 0 if chunks is None else chunks * loads.arena.chunk_bytes


def _in_pool(loads: Loads, resident: Resident) -> pb.StoredCheckpoint:
    return pb.StoredCheckpoint(
        checkpoint=resident.entry.info,
        dram_bytes=resident.ready_bytes,
        disk_bytes=disk_bytes(resident.entry),
        leases=resident.leases,
        pinned=loads.is_pinned(resident.entry.uri),
        loading=resident.phase in {Phase.WAITING, Phase.LOADING},
        last_used_unix_seconds=resident.last_used_unix_seconds,
    )


def _not_in_pool(loads: Loads, entry: CatalogEntry) -> pb.StoredCheckpoint:
    return pb.StoredCheckpoint(
        checkpoint=entry.info,
        disk_bytes=disk_bytes(entry),
        leases=loads.window_leases(entry.identity),
        pinned=loads.is_pinned(entry.uri),
    )


def disk_bytes(entry: CatalogEntry) -> int:
    """Return the bytes of a checkpoint's weights that this host's disk has."""
    return entry.index.weight_bytes if entry.far is None else entry.far.disk_bytes()


def tier_of(resident: Resident) -> str:
    """Return the best tier that holds all of a checkpoint."""
    if resident.phase is Phase.READY and resident.window is None:
        return DRAM
    return DISK if resident.entry.far is None or resident.entry.far.whole else REMOTE

"""Adapters in this worker's memory: read when a session first needs them, the longest unused ones let go.

A session leases its adapter from submit to finish, so what computes is never let go. Any thread may ask;
files are read in threads of their own, so that neither the event loop nor the engine waits for a disk. What
is far away comes from the store, which fetches it once for all workers of its host; it is copied, and its
lease ends.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from services.worker.engine.adapted_rows import AdapterWeights
from stoker import log
from stoker.checkpoint.adapter import open_adapter
from stoker.errors import (
    CapacityError,
    CheckpointInvalid,
    DoesNotFit,
    InvalidRequest,
    LoadFailed,
    StokerError,
)
from stoker.loader.adapters import adapter_tensors, attached_plan, attached_tensors
from stoker.loader.sources import local_folder
from stoker.models.lora import fitted
from stoker.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from stoker.attach import Attachment
    from stoker.checkpoint.adapter import LoraPlan
    from stoker.v1.model_pb2 import AdapterSpec

RETRY_SECONDS = 1.0
THREADS = 4
"""Adapters on their way at a time: one that is far away does not keep those on this host waiting."""

_NUMBER = re.compile(r"\.\d+(?=\.)")
"""A module's place in a list; the second one in a name is an expert's in its layer."""

Key = tuple[str, str]
"""Uri and revision."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """An adapter that is here or coming."""

    weights: Future[AdapterWeights] = field(default_factory=Future)
    leases: int = 0
    nbytes: int = 0


class AdapterCache:
    """The adapters of one model.

    Args:
        model: The base, its parameters in place; their content may still be arriving.
        max_count: Adapters kept at most.
        max_bytes: Bytes of all of them at most, in the model's dtype.
        attach: Asks the store for an adapter that is far away; blocks until it answers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_count: int,
        max_bytes: int,
        attach: Callable[[AdapterSpec], Attachment],
    ) -> None:
        self._model = model
        self._attach = attach
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._element_bytes = next(model.parameters()).element_size()
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._threads = ThreadPoolExecutor(THREADS, "stoker-adapters")

    def lease(self, wanted: AdapterSpec) -> Future[AdapterWeights]:
        """Return an adapter's weights as they come; `release` it once if they do.

        The future is done at once when the adapter is here. It fails with:
            NotFound, CheckpointInvalid: There is none of that revision, or it is not for this model.
            DoesNotFit: It is larger than all adapters together may be.
            CapacityError: Sessions hold as many as there may be; later may work.
            LoadFailed: It could not be read, or the store could not fetch it.
            PeerError: It is far away, and there is no store.
        """
        key = key_of(wanted)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                entry.leases += 1
                return entry.weights
            entry = self._entries[key] = _Entry(leases=1)
        self._threads.submit(self._load, wanted, entry)
        return entry.weights

    def release(self, wanted: AdapterSpec) -> None:
        """End a lease of an adapter that came."""
        with self._lock:
            entry = self._entries.get(key_of(wanted))
            if entry is not None:
                entry.leases = max(0, entry.leases - 1)

    def names(self) -> list[str]:
        """Return what is here, least recently used first."""
        with self._lock:
            done = [entry.weights for entry in self._entries.values() if entry.weights.done()]
        return [weights.result().name for weights in done if weights.exception() is None]

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, wanted: AdapterSpec, entry: _Entry) -> None:
        try:
            weights = self._read(wanted, entry)
        except StokerError as error:
            self._drop(wanted, entry, error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever leases gets the reason
            log.get().error("adapter.load_crashed", adapter=wanted.name, exc_info=error)
            self._drop(wanted, entry, LoadFailed(f"adapter {wanted.name} could not be loaded: {error!r}"))
        else:
            entry.weights.set_result(weights)
            log.get().info(
                "adapter.loaded",
                adapter=wanted.name,
                uri=wanted.uri,
                revision=wanted.revision,
                bytes=entry.nbytes,
            )

    def _read(self, wanted: AdapterSpec, entry: _Entry) -> AdapterWeights:
        if wanted.far:
            return self._fetched(wanted, entry)
        folder = local_folder(wanted.uri)
        if folder is None:
            raise InvalidRequest(
                f"adapter {wanted.name}: {wanted.uri} is no folder of this host; deploy the model again, so "
                "that a store says where it is"
            )
        adapter = open_adapter(folder)
        _refuse_changed(wanted, adapter.revision)
        self._take_in(wanted, entry, adapter)
        tensors = adapter_tensors(adapter)
        _refuse_changed(wanted, open_adapter(folder).revision)  # while it was copied
        modules = fitted(self._model, adapter, tensors)
        return AdapterWeights(name=wanted.name, uri=wanted.uri, revision=adapter.revision, modules=modules)

    def _fetched(self, wanted: AdapterSpec, entry: _Entry) -> AdapterWeights:
        with self._attach(wanted) as attachment:
            plan = attached_plan(attachment)
            self._take_in(wanted, entry, plan)
            modules = fitted(self._model, plan, attached_tensors(attachment))
            revision = attachment.checkpoint.revision
        return AdapterWeights(name=wanted.name, uri=wanted.uri, revision=revision, modules=modules)

    def _take_in(self, wanted: AdapterSpec, entry: _Entry, adapter: LoraPlan) -> None:
        """Check an adapter and make room for it, before its bytes are read."""
        self._refuse_rowless(adapter)
        self._make_room(wanted, entry, self._bytes_of(adapter))

    def _refuse_rowless(self, adapter: LoraPlan) -> None:
        """Refuse modules that don't see every row of a pass: whose rows they see could not be told.

        Raises:
            CheckpointInvalid: Names them.
        """
        head: Any = getattr(self._model, "get_output_embeddings", lambda: None)()
        names = {name for name, module in self._model.named_modules() if module is head and head is not None}
        wrong = [name for name in adapter.pairs if name in names or len(_NUMBER.findall(name)) > 1]
        if wrong:
            raise CheckpointInvalid(
                f"{adapter.location} changes {wrong[0]}; the output head and single experts of a layer are "
                "not supported here: train the adapter without them"
            )

    def _bytes_of(self, adapter: LoraPlan) -> int:
        elements = sum(pair.rank * (pair.in_features + pair.out_features) for pair in adapter.pairs.values())
        return elements * self._element_bytes

    def _make_room(self, wanted: AdapterSpec, entry: _Entry, nbytes: int) -> None:
        """Count an adapter in, letting go of idle ones until it fits."""
        if nbytes > self._max_bytes:
            raise DoesNotFit(
                f"adapter {wanted.name} needs {format_bytes(nbytes)}, and this worker keeps "
                f"{format_bytes(self._max_bytes)} of adapters; raise STOKER_WORKER_MAX_ADAPTER_BYTES"
            )
        with self._lock:
            idle = [key for key, each in self._entries.items() if not each.leases and each.weights.done()]
            while self._is_over(nbytes) and idle:
                del self._entries[idle.pop(0)]
            if self._is_over(nbytes):
                raise CapacityError(
                    f"adapter {wanted.name} has no room: sessions hold {len(self._entries) - 1} other "
                    "adapters of this replica; try again",
                    retry_after_seconds=RETRY_SECONDS,
                )
            entry.nbytes = nbytes

    def _is_over(self, further_bytes: int) -> bool:
        held = sum(entry.nbytes for entry in self._entries.values())
        return held + further_bytes > self._max_bytes or len(self._entries) > self._max_count

    def _drop(self, wanted: AdapterSpec, entry: _Entry, error: StokerError) -> None:
        """Forget an adapter that did not come; the next lease tries again."""
        with self._lock:
            if self._entries.get(key_of(wanted)) is entry:
                del self._entries[key_of(wanted)]
        entry.weights.set_exception(error)


def _refuse_changed(wanted: AdapterSpec, revision: str) -> None:
    if wanted.revision and revision != wanted.revision:
        raise CheckpointInvalid(
            f"adapter {wanted.name} at {wanted.uri} was changed since it was deployed (revision {revision}, "
            f"deployed was {wanted.revision}); deploy the model again"
        )


def key_of(wanted: AdapterSpec) -> Key:
    """Return what an adapter is known by."""
    return wanted.uri, wanted.revision

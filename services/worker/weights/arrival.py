"""Brings a checkpoint's weights to where the model computes, stage by stage, in a thread of its own.

On the processor they need no bringing: the store's memory is the model's. What is left is to enter its pages
into this process's page table as they come, before a forward pass would stumble over each of them, and to
cast what is stored in another dtype than the model computes in.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from services.worker.weights.arrival_order import ArrivalOrder
from stoker.errors import LoadFailed, StokerError

if TYPE_CHECKING:
    from services.worker.weights.weights_gate import WeightsGate
    from stoker.attach import Attachment, Loaded


class Destination(Protocol):
    """Where weights are wanted; called by one thread."""

    def arrived(self, file: int, start: int, end: int) -> None:
        """Take note that these bytes of a file are there now; ascending, without gaps.

        In a window they are gone when this has returned.
        """
        ...

    def complete(self, stage: int) -> None:
        """Finish a stage, all bytes of which are there; its tensors may be used afterwards."""
        ...


class Arrival:
    """One checkpoint's way into the model.

    Args:
        attachment: Where the bytes come from; only this object waits on it from now on.
        order: Its stages.
        destination: Where they go.
        gate: Is opened, or failed.

    Attributes:
        loaded: Ends before the gate opens for the last stage, or with the error that the gate is failed with.
    """

    def __init__(
        self, attachment: Attachment, order: ArrivalOrder, destination: Destination, gate: WeightsGate
    ) -> None:
        self.loaded: Future[Loaded] = Future()
        self._attachment = attachment
        self._order = order
        self._destination = destination
        self._gate = gate
        self._reached = [0] * attachment.file_count

    def start(self) -> None:
        """Begin; the thread ends with the load, or with the process."""
        threading.Thread(target=self._run, name="stoker-arrival", daemon=True).start()

    def _run(self) -> None:
        try:
            loaded = self._bring()
        except StokerError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of this thread: who waits must hear of it
            self._fail(LoadFailed(f"weights could not be brought to their place: {error!r}"))
        else:
            self.loaded.set_result(loaded)
            self._gate.open(self._order.stages)

    def _fail(self, error: StokerError) -> None:
        self.loaded.set_exception(error)
        self._gate.fail(error)

    def _bring(self) -> Loaded:
        last = self._order.stages - 1
        for stage, needs_bytes in enumerate(self._order.needs_bytes):
            for file, upto in enumerate(needs_bytes):
                self._reach(file, upto)
            if stage == last:
                self._use_up()
            self._destination.complete(stage)
            if stage < last:
                self._gate.open(stage + 1)
        return self._attachment.wait_all()

    def _reach(self, file: int, upto: int) -> None:
        """Wait for bytes of a file, handing over what comes meanwhile."""
        while self._reached[file] < upto:
            self._take(file if self._attachment.window_bytes is None else self._first_unfinished())

    def _use_up(self) -> None:
        """Take the rest of a window: the load ends only when all of it has been through."""
        if self._attachment.window_bytes is not None:
            for file in range(self._attachment.file_count):
                self._reach(file, self._attachment.file_bytes(file))

    def _first_unfinished(self) -> int:
        """Return the file that a window shows now: they come one after the other, whatever a stage needs."""
        sizes = map(self._attachment.file_bytes, range(self._attachment.file_count))
        return next(file for file, size in enumerate(sizes) if self._reached[file] < size)

    def _take(self, file: int) -> None:
        start = self._reached[file]
        self._attachment.wait_ready(file, start + 1)
        end = self._attachment.ready_bytes(file)
        self._destination.arrived(file, start, end)
        self._attachment.consumed(file, end)
        self._reached[file] = end

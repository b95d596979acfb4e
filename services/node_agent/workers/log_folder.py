"""The folder of the workers' logs: one file per worker, a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from services.node_agent.workers.worker_log import WorkerLog
from stoker.errors import NotFound
from stoker.ids import ReplicaId, WorkerId

KEPT_LOGS = 64
"""Files kept; beyond that the oldest go. At most `2 * MAX_FILE_BYTES` each."""


class LogFolder:
    """Opens workers' logs and finds them again by replica.

    Args:
        folder: Created when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_worker: OrderedDict[WorkerId, WorkerLog] = OrderedDict()
        self._worker_of: OrderedDict[ReplicaId, WorkerId] = OrderedDict()

    def open(self, worker_id: WorkerId) -> WorkerLog:
        """Return a new worker's log; the oldest files beyond the bound are removed.

        Raises:
            OSError: The file cannot be made.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._prune()
        opened = WorkerLog(self._folder / f"worker-{worker_id}.log")
        self._by_worker[worker_id] = opened
        while len(self._by_worker) > KEPT_LOGS:
            self._by_worker.popitem(last=False)
        return opened

    def assign(self, replica_id: ReplicaId, worker_id: WorkerId) -> None:
        """Remember which worker a replica got."""
        self._worker_of[replica_id] = worker_id
        while len(self._worker_of) > KEPT_LOGS:
            self._worker_of.popitem(last=False)

    def of_replica(self, replica_id: ReplicaId) -> WorkerLog:
        """Return the log of a replica's worker, also after its end.

        Raises:
            NotFound: No worker has had this replica lately.
        """
        worker_id = self._worker_of.get(replica_id)
        found = self._by_worker.get(worker_id) if worker_id is not None else None
        if found is None:
            raise NotFound(f"no log of replica {replica_id} here: no worker has had it, or it is long gone")
        return found

    def _prune(self) -> None:
        in_use = {opened.path.name for opened in self._by_worker.values()}
        files = [path for path in self._folder.glob("worker-*.log*") if path.name not in in_use]
        oldest_first = sorted(files, key=lambda path: path.stat().st_mtime)
        for path in oldest_first[: max(0, len(files) + len(in_use) - KEPT_LOGS)]:
            path.unlink(missing_ok=True)

"""Loading a checkpoint: Stoker, its peers and the limit of the hardware, in one table from one run.

    python -m venv .cache/loaders && .cache/loaders/bin/pip install -r benchmarks/requirements-loading.txt
    python benchmarks/loading.py --size 3 [--rounds 5] [--rows stoker,safetensors_mmap] [--clean]

Sizes: 0.3, 3 and 6 (GB); about 4 times that of disk for the forms of all rows, kept in `.cache/loading`.
`--clean` removes them.

What a row's clock holds: from the order to load until every tensor is there and one byte of each of its
pages was read, in a fresh process whose imports are done. CPU seconds are user and system time of that
process and, for Stoker, of the store daemon. *Pool* rows load into the daemon's pool, which was faulted in
when it started; *own* rows take their memory inside the clock, as a library must. Cold: no page of any form
is in the page cache (checked); warm: all of the file that the row reads is. Rounds are interleaved, figures
are medians.

The limit: fio on the same file with blocks of 16 MiB and 4 readers into memory of the same kind as the
pool's, direct when cold, through the page cache when warm; beside it the same with a bare preadv loop.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loading_checkpoints import SHAPES, Checkpoint, clean, make
from loading_limit import THREADS, fio, fio_buffer
from loading_report import Figures, Row, judge, print_table
from loading_setting import Daemon, daemon, in_fresh_process, make_cold, make_warm
from setting import ROOT, print_heading

from services.store.page_ladder import SharedMemory
from stoker.units import GB, MIB

CACHE = ROOT / ".cache" / "loading"
PEERS = ROOT / ".cache" / "loaders" / "bin" / "python"
HERE = Path(__file__).parent


def rows_of(checkpoint: Checkpoint) -> list[Row]:
    """Return every row, ours first."""
    plain = {"file": checkpoint.plain_file, "folder": checkpoint.plain}
    converted = {"file": checkpoint.converted_file, "folder": checkpoint.converted}
    pool = {"loader": "stoker", "ours": True, "pool": True}
    return [
        Row(name="stoker", **converted, **pool, memory="pool"),
        Row(name="stoker_first", **converted, **pool, recheck=True, memory="pool, digests checked"),
        Row(name="stoker_in_place", **plain, **pool, memory="pool, plain safetensors"),
        Row(name="stoker_library", loader="stoker_library", **converted, ours=True, memory="own, no daemon"),
        Row(name="safetensors_mmap", loader="safetensors_mmap", **plain, memory="page cache"),
        Row(name="safetensors_read", loader="safetensors_read", **plain),
        Row(name="transformers", loader="transformers", **plain, memory="own, module built"),
        Row(name="runai_streamer", loader="runai_streamer", **plain),
        Row(name="fastsafetensors", loader="fastsafetensors", **plain),
        Row(name="instanttensor", loader="instanttensor", **plain),
        Row(name="tensorizer", loader="tensorizer", file=checkpoint.tensorized, folder=checkpoint.plain),
        Row(
            name="torch_mmap",
            loader="torch_mmap",
            file=checkpoint.pickled,
            folder=checkpoint.plain,
            memory="page cache",
        ),
    ]


# --- one measurement ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all measurements share."""

    checkpoint: Checkpoint
    store: Daemon
    peers_python: Path | None
    fio_memory: SharedMemory | None

    def prepare(self, file: Path, *, cold: bool) -> None:
        """Bring the page cache into the state that is measured."""
        if cold:
            make_cold(self.checkpoint.weight_files_there)
        else:
            make_warm(file, self.checkpoint.weight_files_there)

    def measure(self, row: Row, *, cold: bool) -> dict[str, float]:
        """Run a row once."""
        if row.pool:
            self.store.evict(row.folder)
        if row.recheck:
            row.file.chmod(row.file.stat().st_mode & 0o777)  # its change time makes it unknown to the store
        paths = {
            "folder": str(row.folder),
            "file": str(row.file),
            "socket": str(self.store.socket),
            "pickled": str(self.checkpoint.pickled),
            "tensorized": str(self.checkpoint.tensorized),
        }
        python = sys.executable if row.ours else str(self.peers_python)
        daemon_cpu = [0.0]

        def prepare() -> None:
            self.prepare(row.file, cold=cold)
            daemon_cpu[0] = self.store.cpu_seconds()

        answer = in_fresh_process(
            [python, str(HERE / "loading_rows.py"), row.loader, json.dumps(paths)], prepare
        )
        if row.pool:
            answer["cpu_seconds"] += self.store.cpu_seconds() - daemon_cpu[0]
        return answer

    def limit(self, *, cold: bool) -> dict[str, float]:
        """Run fio once on the converted file."""
        assert self.fio_memory is not None
        self.prepare(self.checkpoint.converted_file, cold=cold)
        return fio(self.checkpoint.converted_file, self.fio_memory, cold=cold)

    def loop(self, *, cold: bool, direct: bool) -> dict[str, float]:
        """Run the preadv loop once on the converted file."""
        file = self.checkpoint.converted_file
        mode = "direct" if direct else "buffered"
        command = [sys.executable, str(HERE / "loading_limit.py"), str(file), mode, str(THREADS)]
        return in_fresh_process(command, lambda: self.prepare(file, cold=cold))

    def attach(self) -> dict[str, float]:
        """Attach a fresh process to what is in the pool already."""
        row = rows_of(self.checkpoint)[0]
        paths = {"folder": str(row.folder), "file": str(row.file), "socket": str(self.store.socket)}
        return in_fresh_process(
            [sys.executable, str(HERE / "loading_rows.py"), "stoker", json.dumps(paths)], lambda: None
        )


def measure_all(
    bench: Bench, rows: Sequence[Row], rounds: int
) -> tuple[Figures, list[dict[str, float]], dict[str, str]]:
    """Run everything, interleaved; returns the figures, the attaches, and why rows are missing."""
    figures: Figures = defaultdict(list)
    attaches: list[dict[str, float]] = []
    missing = why_missing(bench, rows)
    for row in rows:
        if row.pool and not row.recheck:
            bench.measure(row, cold=False)  # the store knows the checkpoint and has checked it once
    for number in range(rounds):
        print(f"# round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for cold in (True, False):
            if "fio" not in missing:
                figures["fio", cold].append(bench.limit(cold=cold))
            figures["preadv_loop", cold].append(bench.loop(cold=cold, direct=cold))
            for row in (row for row in rows if row.name not in missing):
                answer = bench.measure(row, cold=cold)
                if "not_here" in answer:
                    missing[row.name] = str(answer["not_here"]).splitlines()[0]
                    continue
                figures[row.name, cold].append(answer)
                if row.name == "stoker":
                    attaches.append(bench.attach())
        figures["direct_though_cached", False].append(bench.loop(cold=False, direct=True))
    _same_bytes(figures)
    return figures, attaches, missing


def why_missing(bench: Bench, rows: Sequence[Row]) -> dict[str, str]:
    """Return the rows that cannot run, with the reason."""
    missing = {}
    if bench.fio_memory is None:
        missing["fio"] = "not installed: apt-get install fio"
    if bench.peers_python is None:
        reason = "no environment of the peers: see the head of this script"
        missing |= {row.name: reason for row in rows if not row.ours}
    return missing


def _same_bytes(figures: Figures) -> None:
    found = {
        (answer["checksum"], answer["tensor_bytes"])
        for answers in figures.values()
        for answer in answers
        if "checksum" in answer
    }
    if len(found) != 1:
        raise RuntimeError(f"the rows did not load the same bytes: {found}")


def main() -> int:
    """Run the command; 0 = all targets met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="3", help="GB of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="", help="only these besides stoker, by name with commas between")
    parser.add_argument("--peers", type=Path, default=PEERS, help="python that has the peers")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the checkpoints")
    parser.add_argument("--clean", action="store_true", help="remove the checkpoints and end")
    arguments = parser.parse_args()
    if arguments.clean:
        clean(arguments.cache)
        return 0
    peers = arguments.peers if arguments.peers.exists() else None
    checkpoint = make(arguments.cache, arguments.size, peers_python=peers)
    chosen = {"stoker", *arguments.rows.split(",")}
    rows = [row for row in rows_of(checkpoint) if not arguments.rows or row.name in chosen]
    print_heading(f"loading {checkpoint.converted_file.stat().st_size / GB:.2f} GB")
    pool_bytes = 16 * MIB * (2 + checkpoint.converted_file.stat().st_size // (16 * MIB))
    with daemon(pool_bytes) as store, fio_buffer() as memory:
        print(f"# pool: {store.pages}\n", flush=True)
        bench = Bench(checkpoint=checkpoint, store=store, peers_python=peers, fio_memory=memory)
        figures, attaches, missing = measure_all(bench, rows, arguments.rounds)
    print_table(figures, rows, missing)
    return 0 if judge(figures, rows, attaches) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Loading a checkpoint: Stoker, its peers and the limit of the hardware, in one table.

    python -m venv .cache/loaders && .cache/loaders/bin/pip install -r benchmarks/requirements-loading.txt
    python benchmarks/loading.py --size 3 [--rounds 3] [--rows safetensors_mmap,transformers] [--join FILE]
    python benchmarks/loading.py --clean

Sizes: 0.3, 3 and 6 (GB); about 4 times that of disk for the forms of all rows, kept in `.cache/loading`.
`--clean` removes them.

What a row's clock holds: from the order to load until every tensor is there and one byte of each of its
pages was read, in a process forked from one whose imports are done. CPU seconds are user and system time of
that process and, for Stoker, of the store daemon. *Pool* rows load into the daemon's pool, which was faulted
in when it started; *own* rows take their memory inside the clock, as a library must. Cold: no page of any
form is in the page cache (checked); warm: all of the file that the row reads is.

The limit: fio on the same file with blocks of 16 MiB and 4 readers into memory of the same kind as the
pool's, direct when cold, through the page cache when warm; beside it the same with a bare preadv loop.

Every round measures the limit, Stoker and the chosen rows, forwards and then backwards in turn, and ratios
are taken within a round: a disk that others use changes from minute to minute. So a sitting may be split:
`--join FILE` adds this run's rounds to those in the file and prints the table of all; with `--rounds 0` it
only prints. 0.3 GB takes about a minute a round, 3 GB two, 6 GB four.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import loading_results
from arguments import not_negative
from loading_checkpoints import SHAPES, Checkpoint, clean, make
from loading_limit import THREADS, fio, fio_buffer
from loading_report import ATTACH, CACHED_DIRECT, FIO, LOOP, STOKER, Row, judge, print_table
from loading_results import Answer, Round, Sitting
from loading_setting import Daemon, RowServer, daemon, in_fresh_process, make_cold, make_warm
from setting import ROOT, describe_machine, print_heading

from services.store.pool.page_ladder import SharedMemory
from stoker.units import GB, MIB

CACHE = ROOT / ".cache" / "loading"
PEERS = ROOT / ".cache" / "loaders" / "bin" / "python"
HERE = Path(__file__).parent
LIMITS = (FIO, LOOP)


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
    """What all measurements share.

    Attributes:
        checkpoint: What is loaded.
        store: The daemon.
        ours: Runs our rows.
        peers: Runs the others; None where they have no environment.
        fio_memory: None where there is no fio.
    """

    checkpoint: Checkpoint
    store: Daemon
    ours: RowServer
    peers: RowServer | None
    fio_memory: SharedMemory | None

    def prepare(self, file: Path, *, cold: bool) -> None:
        """Bring the page cache into the state that is measured."""
        if cold:
            make_cold(self.checkpoint.weight_files_there)
        else:
            make_warm(file, self.checkpoint.weight_files_there)

    def measure(self, row: Row, *, cold: bool) -> Answer:
        """Run a row once."""
        if row.pool:
            self.store.evict(row.folder)
        if row.recheck:
            row.file.chmod(row.file.stat().st_mode & 0o777)  # its change time makes it unknown to the store
        daemon_cpu = [0.0]

        def prepare() -> None:
            self.prepare(row.file, cold=cold)
            daemon_cpu[0] = self.store.cpu_seconds()

        answer = self._load(row, prepare)
        if row.pool:
            answer["cpu_seconds"] += self.store.cpu_seconds() - daemon_cpu[0]
        return answer

    def attach(self, row: Row) -> Answer:
        """Attach a fresh process to what is in the pool already."""
        return self._load(row, lambda: None)

    def limit(self, name: str, *, cold: bool, direct: bool) -> Answer:
        """Run fio, or the preadv loop, once on the converted file."""
        file = self.checkpoint.converted_file
        if name == FIO:
            assert self.fio_memory is not None
            self.prepare(file, cold=cold)
            return fio(file, self.fio_memory, cold=cold)
        mode = "direct" if direct else "buffered"
        command = [sys.executable, str(HERE / "loading_limit.py"), str(file), mode, str(THREADS)]
        return in_fresh_process(command, lambda: self.prepare(file, cold=cold))

    def _load(self, row: Row, prepare: Callable[[], None]) -> Answer:
        paths = {
            "folder": str(row.folder),
            "file": str(row.file),
            "socket": str(self.store.socket),
            "pickled": str(self.checkpoint.pickled),
            "tensorized": str(self.checkpoint.tensorized),
        }
        server = self.ours if row.ours else self.peers
        assert server is not None
        return server.load(row.loader, paths, prepare)


def measure_round(
    bench: Bench, rows: Sequence[Row], *, number: int, cold_only: bool, missing: dict[str, str]
) -> Round:
    """Measure everything once, cold and then warm; backwards in every other round."""
    found = Round()
    by_name = {row.name: row for row in rows}
    order = [*LIMITS, *by_name][:: -1 if number % 2 else 1]
    for cold in (True,) if cold_only else (True, False):
        half = found.of(cold=cold)
        for name in (name for name in order if name not in missing):
            began = time.monotonic()
            if name in LIMITS:
                half[name] = bench.limit(name, cold=cold, direct=cold)
            else:
                answer = bench.measure(by_name[name], cold=cold)
                if "not_here" in answer:
                    missing[name] = str(answer["not_here"])
                    continue
                half[name] = answer
            if name == STOKER and not cold:
                half[ATTACH] = bench.attach(by_name[name])
                half[CACHED_DIRECT] = bench.limit(LOOP, cold=False, direct=True)
            print(
                f"#   {name:<20} {'cold' if cold else 'warm'} {half[name]['wall_seconds']:7.3f} s"
                f" ({time.monotonic() - began:.0f} s with its preparation)",
                file=sys.stderr,
                flush=True,
            )
    _same_bytes(found)
    return found


def why_missing(bench: Bench, rows: Sequence[Row]) -> dict[str, str]:
    """Return the rows that cannot run, with the reason."""
    missing = {}
    if bench.fio_memory is None:
        missing[FIO] = "not installed: apt-get install fio"
    for row in rows:
        server = bench.ours if row.ours else bench.peers
        if server is None:
            missing[row.name] = "no environment of the peers: see the head of this script"
        elif row.loader in server.missing:
            missing[row.name] = server.missing[row.loader]
    return missing


def _same_bytes(found: Round) -> None:
    answers = [*found.cold.values(), *found.warm.values()]
    loaded = {(each["checksum"], each["tensor_bytes"]) for each in answers if "checksum" in each}
    if len(loaded) != 1:
        raise RuntimeError(f"the rows did not load the same bytes: {loaded}")


def measure_part(  # noqa: PLR0913 - what a part is made of
    sitting: Sitting,
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    rounds: int,
    cold_only: bool,
    peers: Path | None,
    join: Path | None,
) -> None:
    """Add rounds to a sitting, and to its file after each."""
    pool_bytes = 16 * MIB * (2 + checkpoint.converted_file.stat().st_size // (16 * MIB))
    theirs = [row.loader for row in rows if not row.ours]
    with (
        daemon(pool_bytes) as store,
        fio_buffer() as memory,
        closing(RowServer(sys.executable, sorted({row.loader for row in rows if row.ours}))) as ours,
    ):
        print(f"# pool: {store.pages}", flush=True)
        others = RowServer(str(peers), theirs) if peers is not None and theirs else None
        bench = Bench(checkpoint=checkpoint, store=store, ours=ours, peers=others, fio_memory=memory)
        try:
            missing = why_missing(bench, rows)
            for row in rows:
                if row.pool and not row.recheck:
                    bench.measure(row, cold=cold_only)  # the store knows it and has checked it once
            command = " ".join(sys.argv[1:])
            sitting.parts.append(f"{rounds} rounds, pool on {store.pages} (loading.py {command})")
            for number in range(rounds):
                print(f"# round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                sitting.rounds.append(
                    measure_round(bench, rows, number=number, cold_only=cold_only, missing=missing)
                )
                sitting.missing |= missing
                if join is not None:
                    loading_results.write(join, sitting)
        finally:
            if others is not None:
                others.close()


def main() -> int:
    """Run the command; 0 = all targets met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="3", help="GB of the checkpoint")
    parser.add_argument("--rounds", type=not_negative, default=3, help="0 = only show what --join has")
    parser.add_argument("--rows", default="", help="only these besides stoker, by name with commas between")
    parser.add_argument(
        "--cold-only",
        action="store_true",
        help="where pool, page cache and a row's memory don't fit at once",
    )
    parser.add_argument("--join", type=Path, default=None, help="add to the figures in this file")
    parser.add_argument("--peers", type=Path, default=PEERS, help="python that has the peers")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the checkpoints")
    parser.add_argument("--clean", action="store_true", help="remove the checkpoints and end")
    arguments = parser.parse_args()
    if arguments.clean:
        clean(arguments.cache)
        return 0
    peers = arguments.peers if arguments.peers.exists() else None
    checkpoint = make(arguments.cache, arguments.size, peers_python=peers)
    rows = rows_of(checkpoint)
    chosen = {STOKER, *arguments.rows.split(",")} if arguments.rows else {row.name for row in rows}
    if unknown := chosen - {row.name for row in rows}:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: there are {', '.join(row.name for row in rows)}")
    print_heading(f"loading {checkpoint.converted_file.stat().st_size / GB:.2f} GB")
    sitting = loading_results.read(arguments.join, size=arguments.size, machine=describe_machine())
    if arguments.rounds:
        part = [row for row in rows if row.name in chosen]
        measure_part(
            sitting,
            checkpoint,
            part,
            rounds=arguments.rounds,
            cold_only=arguments.cold_only,
            peers=peers,
            join=arguments.join,
        )
    if not sitting.rounds:
        parser.error("--rounds 0 without figures in --join FILE: nothing to show")
    print_table(sitting, rows)
    return 0 if judge(sitting, rows) else 1


if __name__ == "__main__":
    sys.exit(main())

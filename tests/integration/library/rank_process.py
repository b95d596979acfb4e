"""All tensor-parallel ranks: each loads its file, says what it computed and how much it read.

They are forked after the imports, which cost seconds of processor time.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed

import stoker
from stoker.loader import (
    model_build,  # noqa: F401 - before the fork, not in each rank
    sources,
)
from stoker.loader import (
    ranks as _ranks,  # noqa: F401 - likewise
)


def counted(source: type, read: list[tuple[str, int]]) -> None:
    """Note what kind of source brings how many bytes."""
    receive = source.receive

    def noted(self: sources.Source) -> None:
        receive(self)
        size = sum(len(self.file_data(file)) for file in range(self.file_count()))
        read.append((source.__name__, size))

    source.receive = noted


def run_rank(rank: int, ranks: int, meeting: str, folder: str, daemons: list[str]) -> list[dict[str, object]]:
    """Load from disk and from each daemon, run the prompt, generate greedily."""
    read: list[tuple[str, int]] = []
    for source in (sources.LocalSource, sources.PoolSource):
        counted(source, read)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    answers = []
    for daemon in (None, *daemons):
        model = stoker.load_model(folder, tp_size=ranks, daemon=daemon)
        prompt = torch.arange(3, 10)[None]
        with torch.no_grad():
            logits = model(prompt).logits
            tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
        kind, size = read[-1]
        answers.append(
            {"tokens": tokens[0].tolist(), "source": kind, "bytes_read": size, "logits": logits.tolist()}
        )
    torch.distributed.destroy_process_group()
    return answers


def main(ranks: int, meeting: str, folder: str, daemons: list[str]) -> None:
    """Run all ranks; each leaves its answers in a file beside the meeting place."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            answers = run_rank(rank, ranks, meeting, folder, daemons)
            Path(f"{meeting}.rank-{rank}").write_text(json.dumps(answers))
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])

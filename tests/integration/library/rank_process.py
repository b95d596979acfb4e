"""All tensor-parallel ranks: each loads its file, says what it computed and how much it read.

They are forked after the imports, which cost seconds of processor time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from transformers import LlamaForCausalLM  # noqa: F401 - imported before the fork, not in each rank

import stoker
from stoker.loader import model_build, ranks, sources  # noqa: F401 - likewise

MEETING = timedelta(seconds=60)
"""Longest wait of one rank for the others, under the test's own limit."""


def counted(source: type, read: list[tuple[str, int]]) -> None:
    """Note what kind of source brings how many bytes."""
    receive = source.receive

    def noted(self: sources.Source) -> None:
        receive(self)
        size = sum(len(self.file_data(file)) for file in range(self.file_count()))
        read.append((source.__name__, size))

    source.receive = noted


def run_rank(rank: int, count: int, meeting: str, folder: str, daemons: list[str]) -> list[dict[str, object]]:
    """Load from disk and from each daemon, run the prompt, generate greedily."""
    read: list[tuple[str, int]] = []
    for source in (sources.LocalSource, sources.PoolSource):
        counted(source, read)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=MEETING
    )
    answers = []
    for daemon in (None, *daemons):
        model = stoker.load_model(folder, tp_size=count, daemon=daemon)
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


def main(count: int, meeting: str, folder: str, daemons: list[str]) -> None:
    """Run all ranks; each leaves its answers in a file beside the meeting place. One that fails ends all."""
    children = set()
    for rank in range(count):
        child = os.fork()
        if not child:
            answers = run_rank(rank, count, meeting, folder, daemons)
            Path(f"{meeting}.rank-{rank}").write_text(json.dumps(answers))
            os._exit(0)
        children.add(child)
    while children:
        ended, status = os.wait()
        children.discard(ended)
        if status:
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])

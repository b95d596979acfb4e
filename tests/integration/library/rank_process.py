"""One tensor-parallel rank: loads its file, says what it computed and how much it read."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed

import stoker
from stoker.loader import sources


def main(meeting: str, rank: int, ranks: int, folders: list[str]) -> None:
    """For each folder load, run the prompt, generate greedily; print one JSON list."""
    read = []
    receive = sources.LocalSource.receive

    def counted(self: sources.LocalSource) -> None:
        receive(self)
        read.append(sum(file.size_bytes for file in self.index.files))

    sources.LocalSource.receive = counted
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    answers = []
    for folder in folders:
        model = stoker.load_model(folder, tp_size=ranks, daemon=None)
        prompt = torch.arange(3, 10)[None]
        with torch.no_grad():
            logits = model(prompt).logits
            tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
        answers.append({"tokens": tokens[0].tolist(), "bytes_read": read[-1], "logits": logits.tolist()})
    sys.stdout.write(json.dumps(answers) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

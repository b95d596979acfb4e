"""One model in several processes.

stoker convert --tensor-parallel 2 FOLDER CUT
torchrun --nproc-per-node 2 examples/library/tensor_parallel.py CUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed

import stoker


def main(folder: str) -> None:
    """Every process loads its own file; together they are the model."""
    torch.distributed.init_process_group("gloo")
    model = stoker.load_model(folder, tp_size=torch.distributed.get_world_size())
    tokens = model.generate(torch.tensor([[1, 5, 7, 9]]), max_new_tokens=8, do_sample=False)
    if torch.distributed.get_rank() == 0:
        print(tokens[0].tolist())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

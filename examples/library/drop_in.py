"""A script for transformers with one import line changed: `python examples/library/drop_in.py FOLDER`."""

from __future__ import annotations

import sys

import torch

from stoker.transformers import AutoModelForCausalLM  # was: from transformers import AutoModelForCausalLM


def main(folder: str) -> None:
    """Load as always."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        print(model(torch.tensor([[1, 5, 7, 9]])).logits[0, -1].topk(3).indices.tolist())


if __name__ == "__main__":
    main(sys.argv[1])

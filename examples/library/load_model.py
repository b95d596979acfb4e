"""Load a model and let it generate: `python examples/library/load_model.py FOLDER`."""

from __future__ import annotations

import sys
import time

import torch

import stoker


def main(folder: str) -> None:
    """Load, generate eight tokens after a fixed prompt, print both."""
    began = time.monotonic()
    model = stoker.load_model(folder)
    print(f"{type(model).__name__} in {model.dtype} after {time.monotonic() - began:.2f} s")
    prompt = torch.tensor([[1, 5, 7, 9]])
    print(model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())


if __name__ == "__main__":
    main(sys.argv[1])

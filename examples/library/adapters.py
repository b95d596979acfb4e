"""One base, several adapters: `python examples/library/adapters.py FOLDER ADAPTER [ADAPTER …]`."""

from __future__ import annotations

import sys

import torch

import stoker


def main(folder: str, *adapters: str) -> None:
    """Attach every adapter to one loaded base and ask the base and each of them."""
    model = stoker.load_model(folder)
    attached = None
    for number, adapter in enumerate(adapters):
        attached = stoker.load_adapter(model, adapter, f"{number}", activate=False)
    prompt = torch.tensor([[1, 5, 7, 9]])
    for name in (None, *(attached.names if attached else ())):
        if attached:
            attached.activate(name)
        with torch.no_grad():
            print(name or "base", model(prompt).logits[0, -1].topk(3).indices.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])

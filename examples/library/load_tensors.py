"""List a checkpoint's largest tensors: `python examples/library/load_tensors.py FOLDER`."""

from __future__ import annotations

import sys

import stoker
from stoker.units import format_bytes


def main(folder: str) -> None:
    """Load every tensor; on the CPU what is in memory already is not copied."""
    tensors = stoker.load_tensors(folder)
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes)[:5]:
        print(f"{format_bytes(tensor.nbytes):>10} {name} {list(tensor.shape)} {tensor.dtype}")


if __name__ == "__main__":
    main(sys.argv[1])

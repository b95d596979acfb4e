"""Look into a checkpoint without loading it: `python examples/library/open_checkpoint.py FOLDER`."""

from __future__ import annotations

import sys

import stoker


def main(folder: str) -> None:
    """Read a few rows of the first tensor; nothing else is read from the disk."""
    with stoker.open(folder) as checkpoint:
        first = checkpoint.keys()[0]
        rows = checkpoint.get_slice(first)
        print(f"{len(checkpoint.keys())} tensors; {first} is {rows.get_dtype()} {rows.get_shape()}")
        print(rows[:2])


if __name__ == "__main__":
    main(sys.argv[1])

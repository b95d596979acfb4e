"""Write a model in the layout that loads fastest: `python examples/library/save_model.py FOLDER NEW`."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM

import stoker
from stoker.units import format_bytes


def main(folder: str, new_folder: str) -> None:
    """Save what transformers loaded; `from_pretrained` opens the result as well."""
    index = stoker.save_model(AutoModelForCausalLM.from_pretrained(folder), new_folder)
    print(f"{index.path}: {len(index.tensors)} tensors, {format_bytes(index.weight_bytes)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

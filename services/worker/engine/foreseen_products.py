"""Proves, while a model is built, the products that its first prefill will want (`row_proof`).

A start leaves a processor idle: one thread makes the modules, the weights come by themselves. The first pass
would otherwise stop for each proof; 30 ms for SmolLM2, whose layers have four shapes.

What is foreseen is a guess that costs nothing where it is wrong, for a pass proves what it lacks: a prompt of
more than one group of rows and no more than two, and matrices that are used as `nn.Linear` uses them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from services.worker.engine.row_product import CACHE_LINE_BYTES, row_product

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORESEEN_GROUPS = 2
"""Rows of a short chat: 33 to 64 tokens with one thread."""

_MATRIX_DIMENSIONS = 2
_COMPUTED_IN = frozenset({torch.float32, torch.bfloat16, torch.float16})


def prove_foreseen(tensors: Mapping[str, torch.Tensor], in_layers: Iterable[str], *, group_rows: int) -> None:
    """Prove the products of a model's layers with two groups of rows.

    Args:
        tensors: By name. Their content is not looked at: it may not be there yet.
        in_layers: Names of those that belong to decoder layers.
        group_rows: Rows of a group in prefills; 0: none are made.
    """
    if group_rows == 0:
        return
    seen = set()
    for name in in_layers:
        weight = tensors.get(name)
        if weight is None or not _is_multiplied(name, weight):
            continue
        bias = tensors.get(f"{name.removesuffix('weight')}bias")
        shape = (weight.shape, weight.dtype, weight.data_ptr() % CACHE_LINE_BYTES, bias is None)
        if shape not in seen:
            seen.add(shape)
            row_product(FORESEEN_GROUPS * group_rows, group_rows, weight.t(), bias)


def _is_multiplied(name: str, weight: torch.Tensor) -> bool:
    is_matrix = weight.ndim == _MATRIX_DIMENSIONS and weight.numel() > 0
    return is_matrix and weight.dtype in _COMPUTED_IN and name.endswith(".weight")


def start_proving(tensors: Mapping[str, torch.Tensor], in_layers: Iterable[str], *, group_rows: int) -> None:
    """Run `prove_foreseen` in a thread of its own, which ends with it."""
    threading.Thread(
        target=prove_foreseen,
        args=(tensors, tuple(in_layers)),
        kwargs={"group_rows": group_rows},
        name="stoker-proofs",
        daemon=True,
    ).start()

"""Decide which tensors need not be stored because the architecture ties them to another. Pure.

Numbered, first match wins, for an output head beside an input embedding of the same dtype and shape:

1. `config.json` says that they are not tied: both are stored.
2. Their bytes differ: both are stored, whatever the configuration says.
3. `config.json`, or where it is silent the architecture's default, says that they are tied: the head is
   left out and the two names become a tied group.
4. Else both are stored: `from_pretrained` would find no head, and equal bytes are no promise.

Other tensors that share memory are stored each on its own: nothing in the format or in transformers would
put them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.checkpoint.execution_order import is_input_embedding, is_output_head

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stoker.checkpoint.plan import PlannedTensor


def tied_groups(
    tensors: Mapping[str, PlannedTensor],
    *,
    ties_embeddings: bool | None,
    default_ties: Callable[[], bool],
    same_bytes: Callable[[str, str], bool],
) -> tuple[tuple[str, ...], ...]:
    """Return groups of names of which only the first is stored.

    Args:
        tensors: What the source holds.
        ties_embeddings: What `config.json` says; None where it is silent.
        default_ties: Tells the architecture's default; asked only when it matters.
        same_bytes: Compares two tensors of the source; asked only when it matters.
    """
    if ties_embeddings is False:
        return ()
    embeddings = sorted(name for name in tensors if is_input_embedding(name))
    heads = sorted(name for name in tensors if is_output_head(name))
    groups: dict[str, list[str]] = {}
    for head in heads:
        for embedding in embeddings:
            if _alike(tensors[head], tensors[embedding]) and same_bytes(embedding, head):
                groups.setdefault(embedding, [embedding]).append(head)
                break
    if not groups or not (ties_embeddings or default_ties()):
        return ()
    return tuple(tuple(names) for names in groups.values())


def _alike(head: PlannedTensor, embedding: PlannedTensor) -> bool:
    return (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and head.nbytes > 0

"""Cuts a skeleton to one rank's pieces, and joins what its modules compute with what the other ranks do.

By the architecture's own `tp_plan`, on plain tensors: parameters get the piece's shape; a row-wise product is
summed over the ranks, with its bias added by the first one; the head's logits are gathered; an embedding cut
by vocabulary looks up what it has and is summed. Attention needs nothing: a rank has whole heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stoker.errors import CheckpointInvalid
from stoker.models.tensor_parallel import cut_of, style_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stoker.models.skeleton import Skeleton

    class Meets(Protocol):
        """See `RankMeeting`."""

        rank: int
        ranks: int

        def sum(self, part: torch.Tensor) -> torch.Tensor:
            """Return the sum over all ranks."""
            ...

        def gather(self, part: torch.Tensor) -> torch.Tensor:
            """Return all ranks' parts side by side."""
            ...


GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
SUMMED = frozenset({"rowwise", "rowwise_rep"})
EMBEDDING = "embedding_rowwise"
UNCHANGED = frozenset({"colwise", "replicate", "replicated_with_grad_allreduce"})
"""What the next module takes as it is: its own piece, or all of it on every rank."""


def cut_skeleton(skeleton: Skeleton, meeting: Meets) -> None:
    """Make a skeleton this rank's, in place; its parameters are on the meta device.

    Raises:
        CheckpointInvalid: The plan cuts a module in a way that this engine doesn't join.
    """
    model = skeleton.model
    plan = dict(model.tp_plan or {})
    for name, module in model.named_modules():
        style = _style_of_module(name, module, plan)
        if style is None or style in UNCHANGED:
            continue
        if style not in GATHERED | SUMMED and style != EMBEDDING:
            raise CheckpointInvalid(
                f"{skeleton.architecture} is not served in ranks: its tp_plan has {name} in the style "
                f"{style!r}, which this engine doesn't join; deploy a conversion without --tensor-parallel"
            )
    for name, module in model.named_modules():
        style = _style_of_module(name, module, plan)
        for leaf, parameter in module._parameters.items():  # noqa: SLF001 - the own ones, to be replaced
            _cut(module, f"{name}.{leaf}", parameter, style_of(f"{name}.{leaf}", plan), meeting.ranks)
        _join(module, style, meeting)


def add_biases_once(model: Any, rank: int) -> None:
    """Leave the biases of row-wise modules to the first rank; `model` has its weights."""
    if rank == 0:
        return
    plan = dict(model.tp_plan or {})
    for name, module in model.named_modules():
        if _style_of_module(name, module, plan) in SUMMED and getattr(module, "bias", None) is not None:
            module._parameters["bias"] = None  # noqa: SLF001 - as transformers itself has it without one


def _style_of_module(name: str, module: nn.Module, plan: dict[str, str]) -> str | None:
    """Return the plan's style for a module that holds parameters of its own."""
    return style_of(f"{name}.weight", plan) if module._parameters else None  # noqa: SLF001 - the own ones


def _cut(module: nn.Module, name: str, parameter: nn.Parameter | None, style: str | None, ranks: int) -> None:
    if parameter is None:
        return
    cut = cut_of(style, name, parameter.ndim)
    if cut is None:
        return
    shape = cut.piece_shape(tuple(parameter.shape), ranks)
    piece = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    module._parameters[name.rpartition(".")[2]] = nn.Parameter(piece, requires_grad=False)  # noqa: SLF001 - as above


def _join(module: nn.Module, style: str | None, meeting: Meets) -> None:
    """Have a module's output be what the whole module's is, and its description that of the piece."""
    match style:
        case "colwise" if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
        case _ if style in SUMMED:
            if isinstance(module, nn.Linear):
                module.in_features = module.weight.shape[1]
            module.register_forward_hook(lambda _module, _args, output: meeting.sum(output))
        case _ if style in GATHERED:  # out_features stay: it is known by giving as many as there are tokens
            module.register_forward_hook(lambda _module, _args, output: meeting.gather(output))
        case "embedding_rowwise" if isinstance(module, nn.Embedding):
            module.padding_idx = None  # a row that this piece may not have
            module.forward = _partial_look_up(module, meeting)  # type: ignore[method-assign,assignment]


def _partial_look_up(module: nn.Embedding, meeting: Meets) -> Callable[[torch.Tensor], torch.Tensor]:
    whole = module.forward
    rows = module.weight.shape[0]

    def look_up(token_ids: torch.Tensor) -> torch.Tensor:
        own = token_ids - meeting.rank * rows
        elsewhere = (own < 0) | (own >= rows)
        found = whole(own.clamp(0, rows - 1))
        return meeting.sum(found.masked_fill(elsewhere[..., None], 0))

    return look_up

"""Cuts a skeleton to one rank's pieces, and joins what its modules compute with what the other ranks do.

By the architecture's own `tp_plan`, on plain tensors: parameters get the piece's shape; a row-wise product
and what experts give are summed over the ranks, with a product's bias added by the first one; the head's
logits, and fused projections that the model takes apart itself, are gathered, and the product after these
takes its piece of the columns; an embedding cut by vocabulary looks up what it has and is summed. Attention
needs nothing: a rank has whole heads, its own or all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stoker.errors import CheckpointInvalid
from stoker.models.tensor_parallel import HEAD_PROJECTIONS, cut_of, style_of

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


GATHERED = frozenset({"colwise_gather_output", "colwise_rep", "embedding_colwise"})
SPLIT_INPUT = frozenset({"rowwise_rep", "rowwise_split_input"})
"""Row-wise products whose input is whole on every rank."""
ROWWISE_PRODUCTS = frozenset({"rowwise"}) | SPLIT_INPUT
SUMMED = frozenset({"all_reduce", "moe_tp_experts"}) | ROWWISE_PRODUCTS
OWN_COLUMNS = frozenset({"colwise", "packed_colwise"})
"""The next module takes this rank's piece as it is."""
UNCHANGED = frozenset(
    {"local_params", "mla_kv_a_proj", "packed_rowwise", "replicate", "replicated_with_grad_allreduce"}
)
"""Whole on every rank, or changed only in what a module holds; without gradients nothing is to be joined."""
EMBEDDING = "embedding_rowwise"
IDENTITY = "moe_identity_expert"
JOINED = GATHERED | SUMMED | OWN_COLUMNS | UNCHANGED | {EMBEDDING, IDENTITY}


def cut_skeleton(skeleton: Skeleton, meeting: Meets) -> None:
    """Make a skeleton this rank's, in place; its parameters are on the meta device.

    Raises:
        CheckpointInvalid: The plan cuts a module in a way that this engine doesn't join.
    """
    model = skeleton.model
    plan = dict(model.tp_plan or {})
    modules = dict(model.named_modules())
    for name in modules:
        style = _style_of_module(name, plan)
        if style is not None and style not in JOINED:
            raise CheckpointInvalid(
                f"{skeleton.architecture} is not served in ranks: its tp_plan has {name} in the style "
                f"{style!r}, which this engine doesn't join; deploy a conversion without --tensor-parallel"
            )
    for name, module in modules.items():
        for leaf, parameter in module._parameters.items():  # noqa: SLF001 - the own ones, to be replaced
            _cut(module, f"{name}.{leaf}", parameter, style_of(f"{name}.{leaf}", plan), meeting.ranks)
        _join(module, _style_of_module(name, plan), meeting)


def deals_out_heads(model: Any) -> bool:
    """Say whether a rank keeps keys and values of its own heads only; otherwise each rank keeps all."""
    plan = dict(model.tp_plan or {})
    return any(
        _style_of_module(name, plan) in OWN_COLUMNS and name.rpartition(".")[2] in HEAD_PROJECTIONS
        for name, _ in model.named_modules()
    )


def add_biases_once(model: Any, rank: int) -> None:
    """Leave the biases of row-wise modules to the first rank; `model` has its weights."""
    if rank == 0:
        return
    plan = dict(model.tp_plan or {})
    for name, module in model.named_modules():
        if _style_of_module(name, plan) in ROWWISE_PRODUCTS and getattr(module, "bias", None) is not None:
            module._parameters["bias"] = None  # noqa: SLF001 - as transformers itself has it without one


def _style_of_module(name: str, plan: dict[str, str]) -> str | None:
    """Return the plan's style for what a module gives, by the module's name or its weight's."""
    return style_of(f"{name}.weight", plan)


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
        case _ if style in OWN_COLUMNS and isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
        case _ if style in SUMMED:
            if isinstance(module, nn.Linear):
                module.in_features = module.weight.shape[1]
            if style in SPLIT_INPUT:
                module.register_forward_pre_hook(_own_columns(meeting))
            module.register_forward_hook(lambda _module, _args, output: meeting.sum(output))
        case _ if style in GATHERED:  # out_features stay: it is known by giving as many as there are tokens
            module.register_forward_hook(lambda _module, _args, output: meeting.gather(output))
        case "moe_identity_expert":  # every rank has it, and what experts give is summed
            module.register_forward_pre_hook(lambda _module, args: (args[0] / meeting.ranks, *args[1:]))
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


def _own_columns(meeting: Meets) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def split(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        whole, *more = args
        return whole.tensor_split(meeting.ranks, dim=-1)[meeting.rank], *more

    return split

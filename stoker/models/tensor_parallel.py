"""How an architecture's own `tp_plan` cuts its parameters. Imports transformers.

What each style does to a parameter is what transformers' `distributed.tensor_parallel` does to it; a test
compares the two for every style. A style that is not in the table is refused, not guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from stoker.checkpoint.cuts import Cut
from stoker.errors import InvalidRequest
from stoker.models.architecture import class_of, config_of
from stoker.models.skeleton import empty_model

if TYPE_CHECKING:
    from collections.abc import Mapping

COLWISE = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
ROWWISE = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
EMBEDDINGS = frozenset({"embedding_rowwise", "embedding_colwise"})
PACKED = frozenset({"packed_colwise", "packed_rowwise"})
WHOLE = frozenset(
    {
        "all_reduce",
        "local_params",
        "mla_kv_a_proj",
        "moe_identity_expert",
        "moe_tp_experts",
        "replicate",
        "replicated_with_grad_allreduce",
    }
)
"""Styles that change what a module does, not what it holds."""

MOST_RANKS_SUGGESTED = 64
_SHOWN_NAMES = 3
HEAD_PROJECTIONS = {
    "q_proj": "num_attention_heads",
    "q_b_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "kv_b_proj": "num_attention_heads",
    "query_key_value": "num_attention_heads",
}
"""Projections whose pieces must be whole heads, and the config's count of them."""


def plan_cuts(
    config_text: bytes, shapes: Mapping[str, tuple[int, ...]], *, ranks: int, where: str
) -> dict[str, Cut]:
    """Return how each tensor of a checkpoint is cut for `ranks` ranks; those not named stay whole.

    Args:
        config_text: Its `config.json`.
        shapes: Of the tensors it stores, by name.
        ranks: How many ranks, 2 or more.
        where: Which checkpoint, for messages.

    Raises:
        CheckpointInvalid: The config describes no model of transformers.
        InvalidRequest: The architecture has no plan, its tensors are not its parameters, or something does
            not divide; the message says for how many ranks it would.
    """
    config = config_of(config_text, where)
    skeleton = empty_model(class_of(config, where), config)
    model = skeleton.model
    if not model.tp_plan:
        raise InvalidRequest(
            f"{where}: {skeleton.architecture} has no tp_plan in transformers: nothing says how to cut it; "
            "convert it without --tensor-parallel."
        )
    names = _parameter_names(model, shapes, where)
    cuts = {
        name: cut
        for name, parameter in names.items()
        if (cut := cut_of(style_of(parameter, model.tp_plan), parameter, len(shapes[name]))) is not None
    }
    _check_ties(skeleton.tied, model.tp_plan, shapes, names, where)
    counts = _head_counts(config, names.values(), model.tp_plan)
    _check_divides(cuts, shapes, counts, ranks, where)
    return cuts


def style_of(parameter: str, plan: Mapping[str, str]) -> str | None:
    """Return the style that a plan gives a parameter, by its own name or its module's; pure."""
    generic = replace_layer_number_by_wildcard(parameter)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0])


def cut_of(  # noqa: PLR0911 - a table
    style: str | None, parameter: str, dimensions: int
) -> Cut | None:
    """Return how a style cuts a parameter; None = every rank holds all of it; pure.

    Args:
        style: From the plan; None = it says nothing.
        parameter: Its name: biases of row-wise modules are added after the sum, once.
        dimensions: Of the parameter.

    Raises:
        InvalidRequest: The style is unknown.
    """
    last = dimensions - 1
    match style:
        case None:
            return None
        case _ if style in WHOLE or not dimensions:
            return None
        case _ if style in COLWISE:
            return Cut(dim=max(last - 1, 0))
        case _ if style in ROWWISE:
            return None if parameter.endswith(".bias") else Cut(dim=last)
        case "embedding_rowwise":
            return Cut(dim=0)
        case "embedding_colwise":
            return Cut(dim=min(1, last))
        case "packed_colwise":
            return Cut(dim=last - 1, blocks=2) if last else Cut(dim=0)
        case "packed_rowwise":
            return Cut(dim=last, blocks=2) if last else None
    raise InvalidRequest(
        f"the tp_plan cuts {parameter} in the style {style!r}, which this version does not know; "
        "convert without --tensor-parallel"
    )


def _parameter_names(model: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
    """Return the model's name of each stored tensor."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    prefix = f"{model.base_model_prefix}."
    names = {
        name: name if name in expected else prefix + name
        for name in shapes
        if name in expected or prefix + name in expected
    }
    strange = [name for name in shapes if name not in names or expected[names[name]] != shapes[name]]
    if strange:
        raise InvalidRequest(
            f"{where}: {len(strange)} tensors are not parameters of {type(model).__name__} as they are "
            f"stored ({', '.join(strange[:_SHOWN_NAMES])}, …): transformers converts them while it loads, "
            "and only what needs no conversion can be cut; convert it without --tensor-parallel."
        )
    return names


def _check_ties(
    tied: Mapping[str, str],
    plan: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    where: str,
) -> None:
    """Refuse a plan that cuts two names of one tensor differently."""
    stored = {parameter: name for name, parameter in names.items()}
    for target, source in tied.items():
        holder = stored.get(source) or stored.get(target)
        if holder is None or (source in stored and target in stored):
            continue
        dimensions = len(shapes[holder])
        if cut_of(style_of(target, plan), target, dimensions) != cut_of(
            style_of(source, plan), source, dimensions
        ):
            raise InvalidRequest(
                f"{where}: {target} is the same tensor as {source}, and the tp_plan cuts them differently; "
                "convert without --tensor-parallel."
            )


def _head_counts(config: Any, parameters: Any, plan: Mapping[str, str]) -> dict[str, int]:
    """Return the counts of attention heads that the plan deals out to ranks."""
    text = config.get_text_config()
    counts: dict[str, int] = {}
    for parameter in parameters:
        projection = parameter.rpartition(".")[0].rpartition(".")[2]
        field = HEAD_PROJECTIONS.get(projection)
        count = getattr(text, field, None) if field else None
        if isinstance(count, int) and style_of(parameter, plan) == "colwise":
            counts[str(field)] = count
    return counts


def _check_divides(
    cuts: Mapping[str, Cut],
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    ranks: int,
    where: str,
) -> None:
    faults = [f"{field} is {count}" for field, count in counts.items() if count % ranks]
    faults += [
        f"{name} is {list(shapes[name])}"
        for name, cut in cuts.items()
        if not cut.divides(shapes[name], ranks)
    ]
    if not faults:
        return
    possible = [
        str(number)
        for number in range(2, MOST_RANKS_SUGGESTED + 1)
        if not any(count % number for count in counts.values())
        and all(cut.divides(shapes[name], number) for name, cut in cuts.items())
    ]
    instead = f"possible are {', '.join(possible)}" if possible else "no other number does either"
    more = f" and {len(faults) - _SHOWN_NAMES} more" if len(faults) > _SHOWN_NAMES else ""
    raise InvalidRequest(
        f"{where} does not divide by {ranks} ranks: {', '.join(faults[:_SHOWN_NAMES])}{more}; {instead}.",
        param="tensor_parallel",
    )

"""What moving sessions costs: a line through the measured moves, per model and path. Pure."""

from __future__ import annotations

from services.controller.cluster_view.learnt import MoveCost, Moved
from services.controller.cluster_view.view import Policy, View
from stoker.ids import ModelName

FADE = 0.95
"""Each move counts this much less once the next one is known: about the last twenty matter."""
LEAST_TOKENS_SPREAD = 1.0
PATHS = ("ship", "replay")


def learn_move(before: MoveCost | None, moved: Moved) -> MoveCost:
    """Return the line after one more measured move; slope and offset are never negative."""
    old = before or MoveCost(a_seconds_per_token=0.0, b_seconds=0.0)
    weight = old.weight * FADE + 1.0
    tokens = old.sum_tokens * FADE + moved.tokens
    seconds = old.sum_seconds * FADE + moved.seconds
    tokens_squared = old.sum_tokens_squared * FADE + moved.tokens**2
    tokens_seconds = old.sum_tokens_seconds * FADE + moved.tokens * moved.seconds
    spread = tokens_squared / weight - (tokens / weight) ** 2
    slope = 0.0
    if spread > LEAST_TOKENS_SPREAD:
        slope = max(0.0, (tokens_seconds / weight - tokens * seconds / weight**2) / spread)
    offset = seconds / weight - slope * tokens / weight
    if offset < 0:
        slope, offset = tokens_seconds / tokens_squared, 0.0
    return MoveCost(
        a_seconds_per_token=slope,
        b_seconds=offset,
        samples=old.samples + 1,
        weight=weight,
        sum_tokens=tokens,
        sum_seconds=seconds,
        sum_tokens_squared=tokens_squared,
        sum_tokens_seconds=tokens_seconds,
    )


def move_seconds(view: View, name: ModelName, tokens: int, policy: Policy) -> float:
    """Return how long moving sessions of `tokens` tokens together takes, by the faster known path."""
    if not view.moves:
        return policy.move_seconds_per_token * tokens + policy.move_seconds
    known = [view.moves[(name, path)] for path in PATHS if (name, path) in view.moves]
    lines = [(cost.a_seconds_per_token, cost.b_seconds) for cost in known] or [
        (policy.move_seconds_per_token, policy.move_seconds)
    ]
    return min(slope * tokens + offset for slope, offset in lines)


def least_move(view: View, policy: Policy) -> tuple[float, float]:
    """Return a line (seconds per token, seconds) that no model's `move_seconds` is below."""
    slopes = [policy.move_seconds_per_token, *(cost.a_seconds_per_token for cost in view.moves.values())]
    offsets = [policy.move_seconds, *(cost.b_seconds for cost in view.moves.values())]
    return min(slopes), min(offsets)

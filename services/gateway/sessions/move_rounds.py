"""Rounds of a planned move: when is the destination level with the source? Pure.

First the keys and values of the tokens there are go to the destination, then those of the tokens that were
made meanwhile, while the source goes on (a staged copy, as in Llumnix), until so few are missing that one
pass computes them. What can't be shipped the destination computes from the tokens (ServerlessLLM, section
5.2), in rounds: each brings it the tokens that were made during the one before, and its first token says that
the round is done. Since it takes tokens it is given in far fewer steps than the source needed to make them,
the lag shrinks to a token or two in a few rounds, whatever the length of the context.

In the last round the source stands still for a moment, so that nothing is made meanwhile and the two don't
compete where they share processors: the first token of the destination is new, and the stream is switched.
The client waits for one step of the destination and a few messages. A source that can't be held, or goes on
before that, only leaves a `lag`: the destination makes those tokens again (they are compared and dropped).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.errors import PeerError
from stoker.v1 import session_pb2

SHIP_LEVEL_TOKENS = 2
"""So few missing tokens cost the destination no more than one: a matrix product takes 2 or 3 rows at least.
The last token's keys and values are never there to be shipped: computing them gives the next one."""
LONG_SESSION_TOKENS = 2048
"""From so many on a second missing token is felt, since each has its own way through all keys and values: two
took 1.00 to 1.12 steps at 275 and 1,219 tokens (SmolLM2, one CPU), 1.27 at 4,378, 1.33 to 1.43 at 7,300; one
took 0.9 to 1.1 at all of them. So all but one are shipped, the last while the source stands still."""
MAX_SHIP_ROUNDS = 6
SHIP_SECONDS = 60.0
"""Longest round of shipping."""
MIN_SHIP_SECONDS = 0.1
"""As little as the source is ever told to take; 0 would mean that there is no hurry."""
LEVEL_TOKENS = 1
"""A lag at which the stream is switched at once."""
MAX_LAG_TOKENS = 4
"""The largest lag it is switched at, when more rounds don't make it smaller."""
MAX_ROUNDS = 8
HOLD_STEPS = 4
"""Of the source: it stands still for so long at most, and `HOLD_EXTRA_SECONDS` for messages."""
HOLD_EXTRA_SECONDS = 0.25
MAX_HOLD_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The destination is level: it owns the session from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """One more round, with the tokens there are now."""

    is_held: bool = False
    """For which the source stands still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The destination can't keep up: the source keeps the session."""

    why: str


class Diverged(PeerError):
    """The destination made other tokens than the client has: another replica must go on from those."""


def ships_on(*, number: int, missing: int, earlier_missing: int) -> bool:
    """Say whether another round of shipping follows.

    Args:
        number: Of the round that has ended, from 1; 0 = none yet.
        missing: Tokens of the session whose keys and values are not at the destination.
        earlier_missing: Before that round.
    """
    is_worth_it = missing > SHIP_LEVEL_TOKENS and number < MAX_SHIP_ROUNDS
    return is_worth_it and (number == 0 or missing < earlier_missing)


def ship_within_seconds(grace_left_seconds: float | None) -> float:
    """Return in which time a round should be shipped: half of what there is; the rest is for what follows.

    The source takes more of its time for it where this needs it (`KvPace`); otherwise there is no hurry.

    Args:
        grace_left_seconds: Until the source ends; None = it goes on.
    """
    limit_seconds = SHIP_SECONDS if grace_left_seconds is None else min(SHIP_SECONDS, grace_left_seconds)
    return max(MIN_SHIP_SECONDS, limit_seconds / 2)


def hold_seconds(step_seconds: float) -> float:
    """Return how long a source may stand still at most whose tokens come at this pace."""
    return min(MAX_HOLD_SECONDS, HOLD_STEPS * step_seconds + HOLD_EXTRA_SECONDS)


def after_round(
    *, number: int, lag: int, earlier_lag: int | None, can_hold: bool = False
) -> Switch | Again | Abandon:
    """Decide what follows a round.

    Args:
        number: Of the round, from 1.
        lag: Tokens the source made during it.
        earlier_lag: Of the round before; None after the first.
        can_hold: The source has not stood still yet, and may be able to.
    """
    is_smallest = number >= MAX_ROUNDS or (earlier_lag is not None and lag >= earlier_lag)
    if lag <= LEVEL_TOKENS or (is_smallest and lag <= MAX_LAG_TOKENS):
        return Again(is_held=True) if can_hold and lag else Switch()
    if number >= MAX_ROUNDS:
        return Abandon(why=f"after {number} rounds the destination was still {lag} tokens behind")
    return Again()


def unseen(event: session_pb2.GenerateEvent, log: Sequence[int], epoch: int) -> session_pb2.GenerateEvent:
    """Return the event without the tokens that are in the log already; it may have none left.

    Args:
        event: Of the destination's stream.
        log: The session's tokens.
        epoch: The destination's.

    Raises:
        Diverged: They differ from the log.
    """
    if event.epoch != epoch:
        return event  # an earlier owner's: whoever feeds it refuses it
    known = min(max(0, len(log) - event.position), len(event.tokens))
    if known == 0:
        return event
    repeated = [token.id for token in event.tokens[:known]]
    if repeated != list(log[event.position : event.position + known]):
        raise Diverged(
            f"the destination made tokens {repeated} from position {event.position}, the client has "
            f"{list(log[event.position : event.position + known])}"
        )
    rest = session_pb2.GenerateEvent()
    rest.CopyFrom(event)
    del rest.tokens[:known]
    rest.position = event.position + known
    return rest

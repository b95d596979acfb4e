"""Rounds of a planned move: when is the destination level with the source? Pure.

First the keys and values of the tokens there are go to the destination, then those of the tokens that were
made meanwhile, while the source goes on (a staged copy, as in Llumnix), until so few are missing that one
pass computes them. What can't be shipped the destination computes from the tokens (ServerlessLLM, section
5.2).

Each round of computing brings it the tokens that were made during the one before; its first token says that
the round is done. Since it takes tokens it is given in far fewer steps than the source needed to make them,
the lag shrinks to a token or two in a few rounds, whatever the length of the context. Then the stream is
switched: the destination makes the `lag` tokens that the client has already (they are compared and dropped),
so the client waits for about `lag + 1` of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.errors import PeerError
from stoker.v1 import session_pb2

SHIP_LEVEL_TOKENS = 8
"""So few missing tokens the destination computes in one pass: it takes 12, and the source makes some more
until then."""
MAX_SHIP_ROUNDS = 6
LEVEL_TOKENS = 1
"""A lag at which the stream is switched at once."""
MAX_LAG_TOKENS = 4
"""The largest lag it is switched at, when more rounds don't make it smaller."""
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The destination is level: it owns the session from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """One more round, with the tokens there are now."""


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


def after_round(*, number: int, lag: int, earlier_lag: int | None) -> Switch | Again | Abandon:
    """Decide what follows a round.

    Args:
        number: Of the round, from 1.
        lag: Tokens the source made during it.
        earlier_lag: Of the round before; None after the first.
    """
    if lag <= LEVEL_TOKENS:
        return Switch()
    is_smallest = number >= MAX_ROUNDS or (earlier_lag is not None and lag >= earlier_lag)
    if is_smallest and lag <= MAX_LAG_TOKENS:
        return Switch()
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

"""A session that goes on from one that is here already, with more tokens: what is computed stays. Pure.

A planned move brings a session in rounds, each under a higher epoch and with the tokens that were made since
the round before. The keys and values of what both have in common are right for both.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.engine.protocol import Snapshot, Submit


def common_tokens(request: Submit, earlier: Snapshot) -> int:
    """Return for how many of its first tokens `request` can use what an earlier run of it has computed.

    Args:
        request: The session as it is now.
        earlier: As it was here.
    """
    if _identity(request.adapter) != _identity(earlier.adapter):  # its keys are another model's
        return 0
    ours = (*request.prompt_token_ids, *request.generated_token_ids)
    theirs = (*earlier.prompt_token_ids, *earlier.generated_token_ids)
    pairs = zip(ours, theirs, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _identity(adapter: AdapterWeights | None) -> tuple[str, str] | None:
    return None if adapter is None else adapter.identity

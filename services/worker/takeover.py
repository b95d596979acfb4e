"""A session that goes on from one that is here already, with more tokens: what is computed stays. Pure.

A planned move brings a session in rounds, each under a higher epoch and with the tokens that were made since
the round before. The keys and values of what both have in common are right for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from services.worker.engine import KvExport, Snapshot, Submit

if TYPE_CHECKING:
    from services.worker.adapted_rows import AdapterWeights


def continued(request: Submit, earlier: Snapshot) -> Snapshot:
    """Return where `request` begins, given what an earlier run of the same session has computed.

    Args:
        request: The session as it is now.
        earlier: As it was here, with its keys and values if it had any.
    """
    tokens = (*request.prompt_token_ids, *request.generated_token_ids)
    is_alike = _identity(request.adapter) == _identity(earlier.adapter)  # else its keys are another model's
    common = _common(tokens, (*earlier.prompt_token_ids, *earlier.generated_token_ids))
    return Snapshot(
        session_id=request.session_id,
        prompt_token_ids=tuple(request.prompt_token_ids),
        generated_token_ids=tuple(request.generated_token_ids),
        sampling=request.sampling,
        kv=_first(earlier.kv, common) if earlier.kv is not None and common and is_alike else None,
        adapter=request.adapter,
    )


def _identity(adapter: AdapterWeights | None) -> tuple[str, str] | None:
    return None if adapter is None else adapter.identity


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _first(kv: KvExport, tokens: int) -> KvExport:
    if tokens >= kv.token_count:
        return kv
    return replace(kv, token_count=tokens, layers=tuple(layer[:, :, :tokens] for layer in kv.layers))

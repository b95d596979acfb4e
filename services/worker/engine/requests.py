"""From a request to a session of the engine: what no step could serve is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.worker.engine.sampling import TokenChooser
from services.worker.engine.session import Session, prefill_token_count
from services.worker.kv.kv_store import SessionKv
from stoker.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from services.worker.engine.protocol import KvExport, Submit
    from services.worker.kv.kv_store import KvBudget


def accepted(  # noqa: PLR0913 - what an engine knows
    request: Submit,
    kv: KvExport | None,
    *,
    vocab_size: int,
    context_tokens: int,
    budget: KvBudget,
    now_seconds: float,
) -> Session:
    """Check a request and return its session.

    Args:
        request: From outside.
        kv: That came with a snapshot.
        vocab_size: Token ids are below it.
        context_tokens: Longest session, prompt and output.
        budget: Where its keys and values will count.
        now_seconds: On the engine's clock.

    Raises:
        InvalidRequest: No prompt, or a token id outside the vocabulary.
        ContextLengthExceeded: Prompt and `max_tokens` don't fit the context.
    """
    prompt, generated = list(request.prompt_token_ids), list(request.generated_token_ids)
    tokens, sampling = prompt + generated, request.sampling
    if not prompt:
        raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    wanted = len(prompt) + (1 if sampling.max_tokens is None else sampling.max_tokens)
    if wanted > context_tokens or len(tokens) > context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens and {wanted - len(prompt)} are to be generated, but "
            f"the context holds {context_tokens}; shorten the prompt or lower max_tokens",
            details={"prompt_tokens": len(prompt), "context_tokens": context_tokens},
        )
    room = context_tokens - len(prompt)
    staged = request.staged
    return Session(
        session_id=request.session_id,
        sampling=sampling,
        prompt_token_count=len(prompt),
        tokens=tokens,
        prefill_tokens=prefill_token_count(request),
        max_output_tokens=room if sampling.max_tokens is None else sampling.max_tokens,
        chooser=TokenChooser(sampling, prompt, generated, vocab_size),
        kv=SessionKv(budget) if staged is None else staged.kv,
        cached=0 if staged is None else staged.tokens,
        submitted_seconds=now_seconds,
        adapter=request.adapter,
        shipped_kv=kv,
    )

"""Prompts: a request's content becomes the token sequences its sessions start from. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.gateway.text.model_text import ModelText
from services.gateway.text_request import Conversation, Prompts, TextRequest
from stoker.errors import InvalidRequest


def encode_prompts(request: TextRequest, text: ModelText, vocabulary_tokens: int) -> list[list[int]]:
    """Return each prompt's tokens; long texts take long, so call it in a thread for those.

    Args:
        request: What the client sent.
        text: The model's text side.
        vocabulary_tokens: Token ids must be below; 0 = as the tokenizer says.

    Raises:
        InvalidRequest: The chat template refuses, a prompt is empty, or a token id is not in the vocabulary.
    """
    limit = vocabulary_tokens or text.vocabulary_tokens
    _check_ids(request.sampling.stop_token_ids, limit, "stop_token_ids")
    _check_ids(request.sampling.logit_bias, limit, "logit_bias")
    match request.content:
        case Conversation() as chat:
            rendered = text.render_chat(
                chat.messages, add_generation_prompt=chat.add_generation_prompt, variables=chat.variables
            )
            prompts = [text.encode(rendered, add_special_tokens=False)]
        case Prompts() as given:
            prompts = [_encode(prompt, text, limit) for prompt in given.prompts]
    if not all(prompts):
        raise InvalidRequest("the prompt is empty; send at least one token", param=_field(request))
    return prompts


def content_characters(request: TextRequest) -> int:
    """Return about how much text there is to encode."""
    match request.content:
        case Conversation() as chat:
            return sum(len(str(message.get("content") or "")) for message in chat.messages)
        case Prompts() as given:
            return sum(len(prompt) for prompt in given.prompts)


def _field(request: TextRequest) -> str:
    return "messages" if isinstance(request.content, Conversation) else "prompt"


def _encode(prompt: str | Sequence[int], text: ModelText, limit: int) -> list[int]:
    if isinstance(prompt, str):
        return text.encode(prompt, add_special_tokens=True)
    _check_ids(prompt, limit, "prompt")
    return list(prompt)


def _check_ids(token_ids: Iterable[int], limit: int, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < limit:
            raise InvalidRequest(
                f"{param} names token {token_id}; this model's tokens are 0 to {limit - 1}", param=param
            )

"""A model's text side, built from its small files: tokenizer, chat template, end tokens, sampling defaults.

Immutable and thread-safe once built. Building parses megabytes of JSON (0.2 s for 49k tokens, in which the
library holds the interpreter's lock), and encoding a long prompt takes long: both belong into a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from services.gateway.text.chat_template import ChatTemplate, choose_source
from services.gateway.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from services.gateway.text.token_bytes import TokenBytes, byte_level_bytes, sentencepiece_bytes
from stoker.errors import CheckpointInvalid, InvalidRequest

MAX_PROMPT_CHARACTERS = 16_000_000
"""Longest text a chat template may make of a request."""

SHORT_CHARACTERS = 1024
"""A text up to this is encoded without the library's thread pool, whose hand-over costs 0.1 ms."""

_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling a model's own `generation_config.json` asks for; None = it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ModelText:
    """What the gateway knows of a model's text.

    Args:
        files: Small files by name, as the store sent them.

    Raises:
        CheckpointInvalid: tokenizer.json is missing, or a file cannot be read.

    Attributes:
        stop_token_ids: Tokens that end an answer, ascending.
        defaults: Sampling for what a client leaves open.
        vocabulary_tokens: Token ids are below this.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        config = _json(files, "tokenizer_config.json")
        generation = _json(files, "generation_config.json")
        self._tokenizer = _tokenizer(files)
        self._byte_level = _is_byte_level(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = TokenBytes(
            self._tokenizer.id_to_token, byte_level_bytes if self._byte_level else sentencepiece_bytes
        )
        special = _special_tokens(config, _json(files, "special_tokens_map.json"))
        self._template = _template(files, config, special)
        self.stop_token_ids = self._stop_tokens(generation, _json(files, "config.json"), special)
        self.defaults = _defaults(generation)
        self.vocabulary_tokens = max(self._tokenizer.get_vocab_size(), max(added, default=-1) + 1)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as the model's text.

        Raises:
            InvalidRequest: The model has no chat template, or the template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot hold a conversation; send the text to "
                "/v1/completions instead",
                param="messages",
            )
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the text's tokens.

        Args:
            text: What to encode; names of special tokens in it become those tokens. The interpreter's lock is
                free meanwhile, but for a short text.
            add_special_tokens: Put the model's opening tokens first. False for rendered conversations: their
                template wrote them.
        """
        if len(text) <= SHORT_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all these tokens at once, special ones left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """Return a fresh detokenizer, for one session."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes, self._skipped)
        return WindowDetokenizer(self.decode, self._skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for, special ones their name."""
        return self._token_bytes[token_id]

    def _stop_tokens(
        self, generation: Mapping[str, Any], config: Mapping[str, Any], special: Mapping[str, str]
    ) -> tuple[int, ...]:
        declared = generation.get("eos_token_id", config.get("eos_token_id"))
        ids = set(declared if isinstance(declared, list) else [declared])
        ids.add(self._tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None)
        return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int) and token_id >= 0))


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    if "tokenizer.json" not in files:
        raise CheckpointInvalid(
            "the checkpoint has no tokenizer.json; save the model's fast tokenizer beside its weights"
        )
    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the Rust library raises bare Exceptions
        raise CheckpointInvalid(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise CheckpointInvalid(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{name} holds a {type(value).__name__}, not an object")
    return value


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    return bool(parts) and all(part.get("type") == "ByteLevel" for part in parts)


def _special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_TOKEN_NAMES:
        declared = config.get(name) or special_map.get(name)
        if isinstance(declared, dict):
            declared = declared.get("content")
        if isinstance(declared, str):
            found[name] = declared
    return found


def _template(
    files: Mapping[str, bytes], config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    from_file = files.get("chat_template.jinja")
    declared = config.get("chat_template") or _json(files, "chat_template.json").get("chat_template")
    try:
        source = choose_source(declared, from_file.decode() if from_file is not None else None)
    except UnicodeDecodeError as error:
        raise CheckpointInvalid(f"chat_template.jinja is not UTF-8: {error}") from error
    if source is None:
        return None
    return ChatTemplate(source, special, max_characters=MAX_PROMPT_CHARACTERS)


def _defaults(generation: Mapping[str, Any]) -> GenerationDefaults:
    """Return what the model's authors recommend: only numbers in range count.

    `do_sample` is not asked: OpenAI's clients expect temperature 1 unless told otherwise, and vLLM too reads
    the numbers and not the switch.
    """

    def number(name: str, low: float, high: float) -> float | None:
        value = generation.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return None
        return float(value)

    top_k = number("top_k", 0, 2**31)
    return GenerationDefaults(
        temperature=number("temperature", 0, 2),
        top_p=number("top_p", 1e-6, 1),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p", 0, 1),
        repetition_penalty=number("repetition_penalty", 1e-3, 100),
    )

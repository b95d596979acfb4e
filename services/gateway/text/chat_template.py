"""Chat templates: a conversation becomes the text its model was trained on.

Templates are Jinja programs written by whoever published the model, so they run in Jinja's sandbox, without
autoescaping, with the names that transformers promises them (`raise_exception`, `strftime_now`, `tojson`
without HTML escapes, loop controls, `{% generation %}` blocks) and with bounds on what they may produce.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker.errors import CheckpointInvalid, InvalidRequest

MAX_PIECES = 1_000_000
"""Pieces a template may yield; templates yield a handful per message."""

DEFAULT_NAME = "default"
"""Which template counts where a tokenizer names several."""


class ChatTemplate:
    """A compiled template; thread-safe.

    Args:
        source: The Jinja source.
        special_tokens: Text of `bos_token`, `eos_token` and the like, by those names.
        max_characters: Longest text it may produce.

    Raises:
        CheckpointInvalid: The source is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, max_characters: int) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointInvalid(f"the model's chat template cannot be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._max_characters = max_characters

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as the model's text.

        Args:
            messages: Each with `role` and `content`, plain JSON values.
            add_generation_prompt: End with the opening of an assistant's turn.
            variables: Further names the template sees (`chat_template_kwargs`).

        Raises:
            InvalidRequest: The template refuses this conversation (its own message), or fails on it.
        """
        names: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(variables or {}),
        }
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._bounded(names)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error.message}", param="messages"
            ) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}",
                param="messages",
            ) from error

    def _bounded(self, names: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        characters = 0
        for piece in self._template.generate(names):
            pieces.append(piece)
            characters += len(piece)
            if characters > self._max_characters or len(pieces) > MAX_PIECES:
                raise InvalidRequest(
                    f"the model's chat template makes more than {self._max_characters} characters of these "
                    "messages; send fewer or shorter ones",
                    param="messages",
                )
        return "".join(pieces)


def choose_source(declared: object, file_source: str | None) -> str | None:
    """Return the template's source, or None when the model has none.

    Args:
        declared: `chat_template` of tokenizer_config.json: a string, or a list of `{name, template}`.
        file_source: What `chat_template.jinja` holds; wins, as in transformers.
    """
    if file_source is not None:
        return file_source
    if isinstance(declared, str):
        return declared
    if isinstance(declared, list):
        named = {
            entry["name"]: entry["template"]
            for entry in declared
            if isinstance(entry, dict) and isinstance(entry.get("template"), str) and "name" in entry
        }
        return named.get(DEFAULT_NAME) or next(iter(named.values()), None)
    return None


class _GenerationBlocks(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks text for training, and renders its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's Extension declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _GenerationBlocks],
        autoescape=False,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates may pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - as above
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)

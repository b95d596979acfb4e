"""OpenAI's requests, checked: each becomes a `TextRequest`, or an `InvalidRequest` that names the field.

Fields nobody knows are ignored, as OpenAI's do; fields that are known, not supported here, and would change
the answer are refused. `null` means absent everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.request_key import RequestKey
from services.gateway.text_request import Conversation, Prompts, TextRequest
from stoker.errors import InvalidRequest

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024
MAX_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    """One more chunk before the end, with the usage and no choices."""


class _Common(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a deployed model."""
    stream: bool | None = None
    """Answer with server-sent events as tokens come."""
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers per prompt; default 1."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 = always the most likely token. Default: the model's own, else 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 or -1 = off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Token id → what is added to its logit."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    """Same seed, same answer; later choices get seeds derived from it."""
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Neither stop tokens nor stop strings end the answer before."""
    stop: str | list[str] | None = None
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    """Go on past the model's own end tokens (for benchmarks)."""

    @field_validator("logit_bias")
    @classmethod
    def _names_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None:
            if len(value) > MAX_BIASES:
                raise ValueError(f"has {len(value)} entries; at most {MAX_BIASES} are allowed")
            for key in value:
                if not (key.isascii() and key.isdigit() and int(key) < 2**32):
                    raise ValueError(f"names {key!r}; its keys must be token ids, e.g. '50256'")
        return value

    @field_validator("stop")
    @classmethod
    def _are_few_and_short(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuses_what_it_cannot_do(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name, value in data.items():
                if name in _UNSUPPORTED and value not in _UNSUPPORTED[name][0]:
                    raise ValueError(f"{name} is not supported by this server{_UNSUPPORTED[name][1]}")
        return data

    @property
    def include_usage(self) -> bool:
        """Say whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, *, max_tokens: int | None, top_logprobs: int | None) -> SamplingRequest:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingRequest(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0) if self.top_k is not None else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
        )


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    """Text, or a list of parts `{"type": "text", "text": …}`."""
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, value: str | list[Any] | None) -> str | None:
        if value is None or isinstance(value, str):
            return value
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                raise ValueError(  # noqa: TRY004 - pydantic reports ValueErrors
                    'has a part that is not {"type": "text", "text": "…"}; only text is supported'
                )
            texts.append(text)
        return "\n".join(texts)

    def to_plain(self) -> dict[str, Any]:
        """Return what a chat template sees."""
        role = "system" if self.role == "developer" else self.role
        plain: dict[str, Any] = {"role": role, "content": self.content or ""}
        return plain | {"name": self.name} if self.name is not None else plain


class ChatCompletionRequest(_Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    """Wins over `max_tokens`, its old name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives shown per token; needs `logprobs`."""
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further names the model's chat template sees."""

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def to_text_request(
        self, request_id: str, *, deadline_seconds: float | None = None, key: RequestKey | None = None
    ) -> TextRequest:
        """Return the request's meaning; what its headers say of deadline and key is given."""
        return TextRequest(
            request_id=request_id,
            model=self.model,
            content=Conversation(
                messages=[message.to_plain() for message in self.messages],
                add_generation_prompt=self.add_generation_prompt is not False,
                variables=self.chat_template_kwargs or {},
            ),
            sampling=self._sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            choices=self.n or 1,
            whole=not self.stream,
            deadline_seconds=deadline_seconds,
            key=key,
        )


class CompletionRequest(_Common):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)
        ]
    )
    """A text, several, or the same as token ids."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives shown per token; 0 = only the token itself."""

    def to_text_request(
        self, request_id: str, *, deadline_seconds: float | None = None, key: RequestKey | None = None
    ) -> TextRequest:
        """Return the request's meaning; what its headers say of deadline and key is given."""
        return TextRequest(
            request_id=request_id,
            model=self.model,
            content=Prompts(prompts=_as_prompts(self.prompt)),
            sampling=self._sampling(
                max_tokens=self.max_tokens or DEFAULT_COMPLETION_TOKENS, top_logprobs=self.logprobs
            ),
            choices=self.n or 1,
            whole=not self.stream,
            deadline_seconds=deadline_seconds,
            key=key,
        )


Request = TypeVar("Request", ChatCompletionRequest, CompletionRequest)


def parse(cls: type[Request], body: bytes) -> Request:
    """Return the request in a body.

    Raises:
        InvalidRequest: It is not JSON, or a field is missing, of the wrong type, out of range, or asks for
            something this server cannot do.
    """
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _as_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _refusal(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidRequest(f"you must provide {param}", param=param)
    if param is None:  # a rule over the whole request begins with the field's name
        named = message.split()[0]
        known = named in ChatCompletionRequest.model_fields or named in _UNSUPPORTED
        return InvalidRequest(message, param=named if known else None)
    return InvalidRequest(f"{param}: {message}", param=param)


def _is_branch(part: int | str) -> bool:
    """Say whether a location's part names a branch of a union instead of a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "list"))


_OFF: tuple[Any, ...] = (None, False, [], {}, "")
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (_OFF, "; describe the tools in a message"),
    "tool_choice": ((*_OFF, "none", "auto"), "; describe the tools in a message"),
    "functions": (_OFF, "; describe the functions in a message"),
    "function_call": ((*_OFF, "none", "auto"), "; describe the functions in a message"),
    "response_format": ((*_OFF, {"type": "text"}), " except for type text; ask for the format in a message"),
    "modalities": ((*_OFF, ["text"]), " except for text"),
    "audio": (_OFF, ""),
    "web_search_options": (_OFF, ""),
    "continue_final_message": (_OFF, ""),
    "chat_template": (_OFF, "; the model's own is used"),
    "guided_json": (_OFF, ""),
    "guided_regex": (_OFF, ""),
    "guided_choice": (_OFF, ""),
    "guided_grammar": (_OFF, ""),
    "structured_outputs": (_OFF, ""),
    "include_stop_str_in_output": (_OFF, "; stop strings are never part of an answer"),
    "use_beam_search": (_OFF, ""),
    "best_of": ((*_OFF, 1), "; use n"),
    "suffix": (_OFF, ""),
    "echo": (_OFF, "; put the prompt before the answer yourself"),
    "prompt_logprobs": (_OFF, ""),
    "prompt_embeds": (_OFF, ""),
}
"""Field → values that ask for nothing, and what to do instead of the others."""

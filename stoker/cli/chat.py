"""`stoker run`: ask a deployed model from the terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated, Any

import typer

from stoker.cli.output import Format, FormatOption, print_json, say
from stoker.client import AsyncClient
from stoker.errors import InvalidRequest
from stoker.units import format_seconds
from stoker.v1 import session_pb2


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("run")(run_model)


def run_model(
    model: Annotated[str, typer.Argument(help="a deployed model; a cold one is started")],
    prompt: Annotated[str, typer.Argument(help="what to ask; '-' or nothing reads standard input")] = "-",
    system: Annotated[str, typer.Option(help="system message")] = "",
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 = greedy")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="answer at most this long")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="same seed, same answer")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for the whole answer")] = 600.0,
    gateway: Annotated[str | None, typer.Option(help="host:port of the gateway's gRPC face")] = None,
    output: FormatOption = Format.text,
) -> None:
    """Send one message to a model and print the answer as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidRequest("the prompt is empty: give one, or pipe one in")
    messages = ([("system", system)] if system else []) + [("user", text)]
    chosen = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in chosen.items() if value is not None}
    asyncio.run(_run(model, messages, sampling, gateway, timeout, output))


async def _run(
    model: str,
    messages: list[tuple[str, str]],
    sampling: dict[str, Any],
    gateway: str | None,
    timeout_seconds: float,
    output: Format,
) -> None:
    began_seconds = time.monotonic()
    first_seconds: float | None = None
    parts: list[str] = []
    finish, prompt_tokens, completion_tokens = "", 0, 0
    async with AsyncClient(gateway=gateway) as client:
        async for event in client.chat(model, messages, timeout_seconds=timeout_seconds, **sampling):
            if event.text:
                first_seconds = first_seconds or time.monotonic() - began_seconds
                parts.append(event.text)
                if output is Format.text:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
            if event.finish_reason:
                finish = (
                    session_pb2.FinishReason.Name(event.finish_reason).removeprefix("FINISH_REASON_").lower()
                )
                prompt_tokens, completion_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    total_seconds = time.monotonic() - began_seconds
    if output is Format.json:
        print_json(
            {
                "model": model,
                "text": "".join(parts),
                "finish_reason": finish,
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "first_token_seconds": first_seconds,
                "total_seconds": total_seconds,
            }
        )
        return
    sys.stdout.write("\n")
    shown = format_seconds(first_seconds) if first_seconds is not None else "-"
    say(f"[dim]first token {shown} · {completion_tokens} tokens in {format_seconds(total_seconds)}[/]")

"""The demo: a real model answers, from cold and warm, on this machine, and nothing stays behind.

    python examples/demo.py [--source FOLDER|HUB_ID]

Starts every service, deploys two models that scale to zero, asks over REST with the official `openai` client,
and shows where a cold start's time went.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from get_model import get_model
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from stoker.cli.local_cluster import ClusterOptions, running_cluster
from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster
from stoker.errors import StokerError
from stoker.units import GIB, format_bytes, format_rate, format_seconds
from stoker.v1 import model_pb2

ROOT = Path(__file__).resolve().parent.parent
DATA_DIR = ROOT / ".data" / "demo"
FIRST, SECOND = "smollm2", "smollm2-twin"
KEEP_ALIVE_SECONDS = 5.0
QUESTION = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 64
POOL_BYTES = 2 * GIB

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question's outcome, as its client saw it; seconds from sending the request."""

    request_id: str
    first_token_seconds: float
    tokens: int
    tokens_per_second: float
    """After the first token."""
    timings: dict[str, Any]
    """What the gateway knows of the request: GET /api/v1/requests/{id}."""


async def demo(source: str | None, data_dir: Path) -> None:
    """Run the whole demo; raises StokerError when something can't be done."""
    model_dir = await asyncio.to_thread(get_model, source)
    console.print("starting gateway, controller, node agent and store ...")
    options = ClusterOptions(data_dir=data_dir, rest_port=0, grpc_port=0, pool_bytes=POOL_BYTES)
    async with running_cluster(options) as cluster:
        console.print(f"serving on {cluster.rest_url}/v1\n")
        async with AsyncClient(gateway=cluster.gateway, controller=cluster.controller) as admin:
            for name in (FIRST, SECOND):
                spec = model_pb2.ModelSpec(
                    name=name, checkpoint_uri=str(model_dir), keep_alive_seconds=KEEP_ALIVE_SECONDS
                )
                deployed = (await admin.deploy(spec)).model.checkpoint
                size = format_bytes(deployed.weight_bytes)
                console.print(f"deployed [bold]{name}[/] ({deployed.architecture}, {size} {deployed.dtype})")
            await _until_warm_worker(admin)
            _drop_from_page_cache(model_dir)
            async with AsyncOpenAI(
                base_url=f"{cluster.rest_url}/v1", api_key="none", max_retries=0
            ) as client:
                cold = await _ask(client, cluster, FIRST, "from cold: nothing in memory")
                warm = await _ask(client, cluster, FIRST, "warm")
                await _until_warm_worker(admin)
                twin = await _ask(client, cluster, SECOND, "from cold, its bytes in host memory")
            _show({"cold, from disk": cold, "cold, from memory": twin, "warm": warm})
            await _show_scale_to_zero(admin)
    shutil.rmtree(data_dir, ignore_errors=True)
    console.print("everything is stopped.")


async def _ask(client: AsyncOpenAI, cluster: LocalCluster, model: str, how: str) -> Answer:
    console.print(f"\n[bold]{model}[/] [dim]({how})[/]\n[cyan]> {QUESTION}[/]")
    began_seconds = time.monotonic()
    first_seconds, tokens, request_id = 0.0, 0, ""
    raw = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    request_id = raw.headers["x-request-id"]
    async for chunk in raw.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            first_seconds = first_seconds or time.monotonic() - began_seconds
            console.print(chunk.choices[0].delta.content, end="", markup=False)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    rest_seconds = time.monotonic() - began_seconds - first_seconds
    console.print()
    async with httpx.AsyncClient(base_url=cluster.rest_url) as http:
        timings = (await http.get(f"/api/v1/requests/{request_id}")).raise_for_status().json()
    return Answer(
        request_id=request_id,
        first_token_seconds=first_seconds,
        tokens=tokens,
        tokens_per_second=(tokens - 1) / rest_seconds,
        timings=timings,
    )


async def _until_warm_worker(admin: AsyncClient) -> None:
    """Wait until a pre-started worker is ready, as it always is on a host that has been up for a moment.

    Where others keep the processors busy it may take long, for its imports give way to them: then go on
    without, and the table shows what the worker took.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            while not any(node.report.warm_workers for node in await admin.nodes()):  # noqa: ASYNC110 - a demo
                await asyncio.sleep(0.1)


async def _show_scale_to_zero(admin: AsyncClient) -> None:
    began_seconds = time.monotonic()
    async with asyncio.timeout(KEEP_ALIVE_SECONDS + 30):
        while await admin.replicas():  # noqa: ASYNC110 - a demo
            await asyncio.sleep(0.2)
    waited = format_seconds(time.monotonic() - began_seconds)
    console.print(f"\nnobody asked for {waited}: both models are at zero replicas again.")


def _drop_from_page_cache(folder: Path) -> None:
    """Make the first start read from the disk, not from the kernel's cache of what was just written."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _show(answers: dict[str, Answer]) -> None:
    """Print the stages of each answer side by side."""
    table = Table(title="\nwhere the time to the first token went", title_justify="left", box=None)
    table.add_column("stage")
    for title in answers:
        table.add_column(title, justify="right")
    stages = [_stages(answer) for answer in answers.values()]
    for name in stages[0]:
        table.add_row(name, *(column.get(name, "-") for column in stages))
    console.print(table)


def _stages(answer: Answer) -> dict[str, str]:
    timings = answer.timings
    start = timings.get("start") or {}

    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else format_seconds(seconds)

    weights = shown(start.get("weights_seconds"))
    for transfer in start.get("transfers", []):
        if int(transfer["bytes"]):
            rate = format_rate(int(transfer["bytes"]), transfer["seconds"])
            weights += f" ({transfer['tier']} {rate})"
    return {
        "route": shown(timings["route_seconds"]),
        "placement": shown(start.get("placement_seconds")),
        "worker": shown(start.get("worker_seconds")),
        "attach": shown(start.get("attach_seconds")),
        "weights": weights,
        "skeleton": shown(start.get("skeleton_seconds")),
        "assign": shown(start.get("assign_seconds")),
        "tokenizer": shown(timings["files_seconds"] + timings["text_seconds"]),
        "first forward": shown(timings["worker"]["prefill_seconds"]),
        "[bold]first token": f"[bold]{shown(answer.first_token_seconds)}",
        "tokens per second": f"{answer.tokens_per_second:.1f}",
    }


async def _until_interrupted(source: str | None, data_dir: Path) -> int:
    work = asyncio.current_task()
    assert work is not None  # noqa: S101 - for the type checker
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(caught, work.cancel)
    try:
        await demo(source, data_dir)
    except asyncio.CancelledError:
        console.print("\ninterrupted: everything is stopped.")
        return 130
    except StokerError as error:
        console.print(f"error: {error.message}", markup=False)
        console.print(f"logs: {data_dir / 'logs'}")
        return 1
    return 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=None, help="model: local folder or file, or hub id")
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="folder for state and logs; removed")
    arguments = parser.parse_args()
    return asyncio.run(_until_interrupted(arguments.source, arguments.data.resolve()))


if __name__ == "__main__":
    sys.exit(main())

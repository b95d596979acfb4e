"""What the warm path adds: client → gateway → node agent → worker, against the engine called in-process.

    python benchmarks/gateway_overhead.py [--rounds 3] [--samples 20]

Each round measures both, in turn, on the same model with the same prompt's tokens and the same sampling: the
time to the first token of one request alone, so many times, and the tokens per second of 8 concurrent
requests. The engine alone (`engine_alone.py`) runs in a process of its own, loaded from the same folder, with
the same batch; the cluster idles meanwhile, and it while the cluster answers. Both must give the same tokens.

The client is a bare socket on the event loop that the services use, and keeps its connection from request to
request as clients' pools do: a client library's own time (`openai` over `httpx`: some milliseconds) and the
setting up of connections are the same whatever answers.

Two prefills of the same tokens differ by more than what is looked for, so both sides are compared without:
each one's time to the first token less the queue and prefill that its engine accounts for, which it tells
every caller with a first token. What the path adds is the difference of the two. The difference of the whole
times is printed too; it says the same but for the noise of the prefills.

Targets: at most 5 ms added to the first token in the median; at least 95 % of the engine's tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvloop
from arguments import positive
from setting import MODEL_DIR, KeptConnection, cluster, median, print_heading, stream_kept

from services.gateway.text.model_text import ModelText
from stoker.client.connection import LocalCluster
from stoker.v1 import model_pb2

STREAMS = 8
TOKENS = 64
TARGET_ADDED_SECONDS = 0.005
TARGET_SHARE = 0.95
QUESTION = "Why is the sky blue?"
MESSAGES = [{"role": "user", "content": QUESTION}]
ENGINE_ALONE = Path(__file__).with_name("engine_alone.py")
MAX_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What some requests at once gave, on either side."""

    first_seconds: float
    """To the first token of all."""
    in_engine_seconds: float
    """Of it, queue and prefill as the engine tells; 0 where there were several requests."""
    rate: float
    """Tokens per second."""
    text: str
    """Of the first answer."""

    @property
    def around_engine_seconds(self) -> float:
        """Return what was spent around the engine until the first token."""
        return self.first_seconds - self.in_engine_seconds


Run = Callable[[int, int], Awaitable[Measured]]
"""Runs so many streams of so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Results of one side."""

    run: Run
    firsts: list[Measured] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Gateway:
    """Requests through the whole path.

    Args:
        running: The cluster.
    """

    def __init__(self, running: LocalCluster) -> None:
        self._url = running.rest_url
        self._connections = [KeptConnection(self._url) for _ in range(STREAMS)]
        self._http = httpx.AsyncClient(base_url=self._url)

    async def run(self, streams: int, tokens: int) -> Measured:
        """See `Run`."""
        body: dict[str, object] = {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for connection in self._connections[:streams]:
            await connection.ends()
        began_seconds = time.monotonic()
        results = await asyncio.gather(*(stream_kept(one, body) for one in self._connections[:streams]))
        ended_seconds = time.monotonic()
        made = sum(result.completion_tokens for result in results)
        if made != streams * tokens:
            raise SystemExit(f"expected {streams * tokens} tokens, got {made}")
        in_engine = 0.0
        if streams == 1:
            trace = (await self._http.get(f"/api/v1/requests/{results[0].request_id}")).raise_for_status()
            worker = trace.json()["worker"]
            in_engine = worker["queue_seconds"] + worker["prefill_seconds"]
        return Measured(
            first_seconds=min(result.token_times_seconds[0] for result in results) - began_seconds,
            in_engine_seconds=in_engine,
            rate=made / (ended_seconds - began_seconds),
            text=results[0].text,
        )

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()
        await self._http.aclose()


class Alone:
    """Requests to the engine in its own process. Make one with `start`.

    Args:
        process: `engine_alone.py`.
        text: The model's text side.
    """

    def __init__(self, process: asyncio.subprocess.Process, text: ModelText) -> None:
        self._process = process
        self._text = text
        self._prompt = text.encode(text.render_chat(MESSAGES), add_special_tokens=False)

    @classmethod
    async def start(cls, folder: Path) -> Alone:
        """Load the model and return when it is warm."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ENGINE_ALONE), str(folder), limit=MAX_LINE_BYTES,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        alone = cls(process, read_text(folder))
        await alone._line()
        return alone

    async def run(self, streams: int, tokens: int) -> Measured:
        """See `Run`."""
        assert self._process.stdin is not None
        asked = {"streams": streams, "tokens": tokens, "prompt_token_ids": self._prompt}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        answer = json.loads(await self._line())
        return Measured(
            first_seconds=answer["first"],
            in_engine_seconds=answer["in_engine"] if streams == 1 else 0.0,
            rate=answer["rate"],
            text=self._text.decode(answer["token_ids"]),
        )

    async def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()


def read_text(folder: Path) -> ModelText:
    """Return the text side of the model in a folder."""
    small = [*folder.glob("*.json"), *folder.glob("*.jinja")]
    return ModelText({path.name: path.read_bytes() for path in small})


async def measure(rounds: int, samples: int, folder: Path) -> bool:
    """Run everything and print the table; return whether the target is met."""
    async with cluster("overhead", pool_bytes=2**30) as (running, admin):
        spec = model_pb2.ModelSpec(
            name="m", checkpoint_uri=str(folder), keep_alive_seconds=-1, concurrency=STREAMS
        )
        await admin.deploy(spec)
        gateway = Gateway(running)
        await gateway.run(1, 4)
        alone = await Alone.start(folder)
        engine_side, gateway_side = Side(run=alone.run), Side(run=gateway.run)
        try:
            sides = [engine_side, gateway_side]
            for _ in range(rounds):
                for _ in range(samples):
                    for side in sides:
                        side.firsts.append(await side.run(1, 2))
                    sides.reverse()
                for side in sides:
                    side.rates.append((await side.run(STREAMS, TOKENS)).rate)
        finally:
            await alone.close()
            await gateway.close()
    texts = {one.text for side in (engine_side, gateway_side) for one in side.firsts}
    if len(texts) > 1:
        raise SystemExit(f"the two sides answered differently: {texts}")
    return report(engine_side, gateway_side)


def report(engine: Side, gateway: Side) -> bool:
    """Print the figures; return whether the target is met."""
    print(f"             first token, ms    of it around the engine, ms    tokens/s at {STREAMS} streams")
    for name, side in (("engine", engine), ("gateway", gateway)):
        first = median([one.first_seconds for one in side.firsts])
        around = median([one.around_engine_seconds for one in side.firsts])
        print(f"  {name:<10} {1000 * first:15.1f} {1000 * around:30.2f} {median(side.rates):24.1f}")
    pairs = list(zip(engine.firsts, gateway.firsts, strict=True))
    added = [b.around_engine_seconds - a.around_engine_seconds for a, b in pairs]
    apart = [b.first_seconds - a.first_seconds for a, b in pairs]
    share = median([b / a for a, b in zip(engine.rates, gateway.rates, strict=True)])
    met = median(added) <= TARGET_ADDED_SECONDS and share >= TARGET_SHARE
    print(f"\nadded to the first token, {len(added)} pairs: {describe(added)}")
    print(f"whole times apart: {describe(apart)}")
    print(
        f"{'met' if met else 'MISSED'}: {1000 * median(added):.1f} ms added to the first token "
        f"(target {1000 * TARGET_ADDED_SECONDS:g} ms), {share:.1%} of the engine's tokens/s "
        f"(target {TARGET_SHARE:.0%}); medians"
    )
    return met


def describe(seconds: Sequence[float]) -> str:
    """Return least, quartiles and most."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    found = zip(("fastest", "quartile", "median", "quartile", "slowest"),
                (min(seconds), low, middle, high, max(seconds)), strict=True)  # fmt: skip
    return ", ".join(f"{name} {1000 * value:.1f}" for name, value in found) + " ms"


def main() -> int:
    """Run the command; 0 = target met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--samples", type=positive, default=20, help="first tokens per side and round; default: 20"
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder; default: the demo's model")
    arguments = parser.parse_args()
    folder = arguments.model.resolve()
    if not (folder / "config.json").exists():
        raise SystemExit(f"no model in {folder}: run `make model` first")
    print_heading("the warm path against the engine in-process")
    return 0 if uvloop.run(measure(arguments.rounds, arguments.samples, folder)) else 1


if __name__ == "__main__":
    sys.exit(main())

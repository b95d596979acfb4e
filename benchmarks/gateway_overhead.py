"""What the warm path adds: client → gateway → node agent → worker, against the engine called in-process.

    python benchmarks/gateway_overhead.py [--rounds 5]

Each round measures both, in turn, on the same model: the time to the first token of one request alone, and
the tokens per second of 8 concurrent requests. The engine alone (`engine_alone.py`) runs in a process of its
own, loaded from the same folder, with the same batch; the cluster idles meanwhile. The client is a bare
socket on the event loop that the services use.

What the path adds to the first token is taken from single requests: the client's first token less the queue
and prefill that the engine itself spent on that request. (The difference between the two columns would say
the same but for the noise of two prefills in two processes, which is larger than what is looked for; it is
printed too.)

Targets: at most 5 ms added to the first token in the median; at least 95 % of the engine's tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import httpx
import uvloop
from setting import MODEL_DIR, cluster, median, print_heading, stream_chat

from stoker.client.connection import LocalCluster
from stoker.v1 import model_pb2

STREAMS = 8
TOKENS = 64
FIRST_TOKEN_SAMPLES = 7
TARGET_ADDED_SECONDS = 0.005
TARGET_SHARE = 0.95
QUESTION = "Why is the sky blue?"
ENGINE_ALONE = Path(__file__).with_name("engine_alone.py")


async def through_gateway(running: LocalCluster, streams: int, tokens: int) -> dict[str, float]:
    """Return the same figures for requests through the gateway."""
    body: dict[str, object] = {
        "model": "m",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    began = time.monotonic()
    results = await asyncio.gather(*(stream_chat(running.rest_url, body) for _ in range(streams)))
    ended = time.monotonic()
    made = sum(result.completion_tokens for result in results)
    if made != streams * tokens:
        raise SystemExit(f"expected {streams * tokens} tokens, got {made}")
    first = min(result.token_times_seconds[0] for result in results) - began
    figures = {"first": first, "rate": made / (ended - began)}
    if streams == 1:
        async with httpx.AsyncClient(base_url=running.rest_url) as http:
            trace = (await http.get(f"/api/v1/requests/{results[0].request_id}")).raise_for_status().json()
        in_engine = trace["worker"]["queue_seconds"] + trace["worker"]["prefill_seconds"]
        figures["added"] = results[0].first_token_seconds - in_engine
    return figures


async def measure(rounds: int, folder: Path) -> bool:
    """Run everything and print the table; return whether the target is met."""
    firsts: dict[str, list[float]] = {"engine": [], "gateway": [], "added": []}
    rates: dict[str, list[float]] = {"engine": [], "gateway": []}
    async with cluster("overhead", pool_bytes=2**30) as (running, admin):
        spec = model_pb2.ModelSpec(
            name="m", checkpoint_uri=str(folder), keep_alive_seconds=-1, concurrency=STREAMS
        )
        await admin.deploy(spec)
        await through_gateway(running, 1, 4)
        engine = await asyncio.create_subprocess_exec(
            sys.executable, str(ENGINE_ALONE), str(folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert engine.stdin is not None
        assert engine.stdout is not None
        reading = engine.stdout
        writing = engine.stdin
        try:
            await reading.readline()

            async def alone(streams: int, tokens: int) -> dict[str, float]:
                writing.write(f"{streams} {tokens}\n".encode())
                answer: dict[str, float] = json.loads(await reading.readline())
                return answer

            for _ in range(rounds):
                for _ in range(FIRST_TOKEN_SAMPLES):
                    firsts["engine"].append((await alone(1, 2))["first"])
                    warm = await through_gateway(running, 1, 2)
                    firsts["gateway"].append(warm["first"])
                    firsts["added"].append(warm["added"])
                rates["engine"].append((await alone(STREAMS, TOKENS))["rate"])
                rates["gateway"].append((await through_gateway(running, STREAMS, TOKENS))["rate"])
        finally:
            writing.close()
            await engine.wait()
    return report(firsts, rates)


def report(firsts: dict[str, list[float]], rates: dict[str, list[float]]) -> bool:
    """Print the figures; return whether the target is met."""
    print(f"                     first token, ms    tokens/s at {STREAMS} streams")
    for name in ("engine", "gateway"):
        print(f"  {name:<16} {1000 * median(firsts[name]):15.1f} {median(rates[name]):20.1f}")
    added = median(firsts["added"])
    apart = median([b - a for a, b in zip(firsts["engine"], firsts["gateway"], strict=True)])
    share = median([b / a for a, b in zip(rates["engine"], rates["gateway"], strict=True)])
    met = added <= TARGET_ADDED_SECONDS and share >= TARGET_SHARE
    print(f"\nfirst tokens apart, median of pairs: {1000 * apart:+.1f} ms")
    print(
        f"added to the first token: {1000 * min(firsts['added']):.1f} to {1000 * max(firsts['added']):.1f} ms"
    )
    print(
        f"{'met' if met else 'MISSED'}: {1000 * added:.1f} ms added to the first token "
        f"(target {1000 * TARGET_ADDED_SECONDS:g} ms), {share:.1%} of the engine's tokens/s "
        f"(target {TARGET_SHARE:.0%}); medians"
    )
    return met


def main() -> int:
    """Run the command; 0 = target met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder; default: the demo's model")
    arguments = parser.parse_args()
    folder = arguments.model.resolve()
    if not (folder / "config.json").exists():
        raise SystemExit(f"no model in {folder}: run `make model` first")
    print_heading("the warm path against the engine in-process")
    return 0 if uvloop.run(measure(arguments.rounds, folder)) else 1


if __name__ == "__main__":
    sys.exit(main())

"""`make oracle`: the whole oracle, on a real model: `python -m benchmarks.oracle FOLDER`.

For every dtype, sampling and batch: the run in which nothing dies, then one run per token position in which
the replica dies after that token (`--chain`: one run in which it dies after every token); the answers must be
equal bit by bit. Prints a line per case; the last line is the figure beside its target, the exit status says
whether it was met.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import torch

from services.worker.engine import EngineLimits
from services.worker.transformers_engine import TransformersEngine
from tests.integration.streams.engines import Replicas, answer, engine_model, text_of
from tests.integration.streams.test_oracle import BESIDE, GREEDY, PROMPT, SAMPLED

LIMITS = EngineLimits(max_batch=4, max_waiting=8, max_kv_tokens=4096)


async def main() -> int:
    """Run the cases until they are done or the time is over; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--positions", type=int, default=64, help="token positions, from 0")
    parser.add_argument("--step", type=int, default=1, help="every how many of them")
    parser.add_argument("--chain", action="store_true", help="all positions in one stream")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no run after this")
    asked = parser.parse_args()
    began, done, differing = time.monotonic(), 0, 0
    text = text_of(asked.folder)
    for dtype in (torch.bfloat16, torch.float32):
        model = engine_model(asked.folder, dtype)

        def new_engine(model: torch.nn.Module = model) -> TransformersEngine:
            return TransformersEngine(model, LIMITS)

        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
            how = sampling | {"max_tokens": asked.positions + 2, "top_logprobs": 3, "ignore_eos": True}
            wanted = await answer(Replicas(new_engine), text, PROMPT, **how)
            for batch, beside in (("alone", ()), ("mixed", BESIDE)):
                equal = case = 0
                positions = tuple(range(0, asked.positions + 1, asked.step))
                for kills in [positions] if asked.chain else [(position,) for position in positions]:
                    if time.monotonic() - began > asked.limit_seconds:
                        break
                    found = await answer(Replicas(new_engine, kills, beside), text, PROMPT, **how)
                    case += len(kills)
                    equal += len(kills) * (found == wanted)
                done, differing = done + case, differing + case - equal
                title = f"{str(dtype).removeprefix('torch.')} {name} {batch}"
                print(f"{title}: {equal} of {case} kills left the answer as it was", flush=True)
    print(f"kills after which the answer differed: {differing} of {done} (target: 0)")
    return int(differing > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

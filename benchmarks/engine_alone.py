"""The engine of a worker with nothing around it: the yardstick of `gateway_overhead.py`, which starts it.

    python benchmarks/engine_alone.py FOLDER

Answers each JSON line on standard input, `{"streams": 1, "tokens": 2, "prompt_token_ids": [...]}`, with a
JSON line: seconds to the first token, how many of them the engine itself accounts for (queue and prefill, as
it tells every caller with a first token), the first session's tokens, and tokens per second from the first
request sent to the last token received.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from services.node_agent.workers.worker_process import default_threads
from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import EngineLimits, Output, Sampling, Submit, TokenOut
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.model_loading import build_skeleton
from services.worker.warm import warm_up
from stoker.ids import SessionId
from stoker.models.weights import assign_weights

MAX_BATCH = 8
WARM_UP_PROMPT = range(100, 136)


class EngineAlone:
    """A model, its engine, and the thread that steps it."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(default_threads())  # as a worker runs
        warm_up()
        config = json.loads((folder / "config.json").read_text())
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        model = assign_weights(build_skeleton(config, device=torch.device("cpu")), tensors)
        engine = TransformersEngine(model, EngineLimits(max_batch=MAX_BATCH))
        self._done = threading.Event()
        self._open: set[str] = set()
        self._times_seconds: list[float] = []
        self._token_ids: dict[str, list[int]] = {}
        self._in_engine_seconds = 0.0
        self._runs = 0
        self._thread = EngineThread(engine, on_outputs=self._take, on_failure=self._fail)
        self._thread.start()

    def run(self, streams: int, tokens: int, prompt_token_ids: Sequence[int]) -> dict[str, object]:
        """Return what `streams` sessions at once gave: `first`, `in_engine`, `token_ids` and `rate`."""
        self._runs += 1
        names = [f"{self._runs}-{index}" for index in range(streams)]
        self._open, self._times_seconds = set(names), []
        self._token_ids = {name: [] for name in names}
        self._done.clear()
        began_seconds = time.monotonic()
        for name in names:
            self._thread.submit(
                Submit(
                    session_id=SessionId(name),
                    prompt_token_ids=list(prompt_token_ids),
                    sampling=Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True),
                )
            )
        self._done.wait()
        times = self._times_seconds
        if len(times) != streams * tokens:
            raise SystemExit(f"expected {streams * tokens} tokens, got {len(times)}")
        return {
            "first": times[0] - began_seconds,
            "in_engine": self._in_engine_seconds,
            "token_ids": self._token_ids[names[0]],
            "rate": len(times) / (times[-1] - began_seconds),
        }

    def _take(self, outputs: list[Output]) -> None:
        now_seconds = time.monotonic()
        for output in outputs:
            if not isinstance(output, TokenOut):
                self._open.discard(output.session_id)
                continue
            self._times_seconds.append(now_seconds)
            self._token_ids[output.session_id].append(output.token_id)
            if output.timings is not None and len(self._times_seconds) == 1:
                self._in_engine_seconds = output.timings.queue_seconds + output.timings.prefill_seconds
        if not self._open:
            self._done.set()

    def _fail(self, error: BaseException) -> None:
        sys.stderr.write(f"engine failed: {error}\n")
        self._done.set()


def main() -> None:
    """Run until standard input ends."""
    engine = EngineAlone(Path(sys.argv[1]))
    engine.run(1, 4, WARM_UP_PROMPT)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(engine.run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

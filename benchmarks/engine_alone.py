"""The engine of a worker with nothing around it: the yardstick of `gateway_overhead.py`, which starts it.

    python benchmarks/engine_alone.py FOLDER

Answers each line `streams tokens` on standard input with a JSON line: seconds to the first token, and tokens
per second from the first request sent to the last token received.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from services.node_agent.worker_process import default_threads
from services.worker.engine import EngineLimits, Output, Sampling, Submit, TokenOut
from services.worker.engine_thread import EngineThread
from services.worker.model_loading import build_skeleton
from services.worker.transformers_engine import TransformersEngine
from services.worker.warm import warm_up
from stoker.ids import SessionId
from stoker.models.weights import assign_weights

MAX_BATCH = 8
PROMPT_TOKENS = 36
"""As many as the question has in the chat template."""


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
        self._runs = 0
        self._thread = EngineThread(engine, on_outputs=self._take, on_failure=self._fail)
        self._thread.start()

    def run(self, streams: int, tokens: int) -> dict[str, float]:
        """Return seconds to the first token, and tokens per second, of `streams` sessions at once."""
        self._runs += 1
        names = [f"{self._runs}-{index}" for index in range(streams)]
        self._open, self._times_seconds = set(names), []
        self._done.clear()
        began_seconds = time.monotonic()
        for name in names:
            self._thread.submit(
                Submit(
                    session_id=SessionId(name),
                    prompt_token_ids=tuple(range(100, 100 + PROMPT_TOKENS)),
                    sampling=Sampling(max_tokens=tokens, ignore_eos=True),
                )
            )
        self._done.wait()
        times = self._times_seconds
        if len(times) != streams * tokens:
            raise SystemExit(f"expected {streams * tokens} tokens, got {len(times)}")
        return {"first": times[0] - began_seconds, "rate": len(times) / (times[-1] - began_seconds)}

    def _take(self, outputs: list[Output]) -> None:
        now_seconds = time.monotonic()
        for output in outputs:
            if isinstance(output, TokenOut):
                self._times_seconds.append(now_seconds)
            else:
                self._open.discard(output.session_id)
        if not self._open:
            self._done.set()

    def _fail(self, error: BaseException) -> None:
        sys.stderr.write(f"engine failed: {error}\n")
        self._done.set()


def main() -> None:
    """Run until standard input ends."""
    engine = EngineAlone(Path(sys.argv[1]))
    engine.run(1, 4)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        sys.stdout.write(json.dumps(engine.run(streams, tokens)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

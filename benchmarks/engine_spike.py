"""Compare ways to run a transformers model for many requests: `generate`, its continuous batching, our loop.

    python benchmarks/engine_spike.py [--model FOLDER] [--threads 1] [--dtypes float32,bfloat16]

Same prompts, greedy, the same run, rounds interleaved; medians. The last line is a figure beside its target:
our loop's throughput at batch 8 in each dtype, `generate` being 1, by CPU seconds with one thread (on a
shared machine wall seconds say more about the neighbours), else by wall seconds. Exits 1 when one is below 1,
when our loop's tokens differ from `generate`'s (float32), or when its results depend on the batch. Batch 1 is
reported before it, beside what it should be; it has no say in the exit status.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from arguments import positive
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from services.worker.engine.protocol import EngineLimits, Sampling, Submit, TokenOut
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.model_loading import build_skeleton
from stoker.ids import SessionId
from stoker.models.weights import assign_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

MODEL_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models" / "smollm2-135m-instruct"
PROMPT_TOKENS = 32
TARGET_RATIO = 1.0
"""Our loop's tokens per second at batch 8, `generate`'s being 1."""
SINGLE_RATIO = 0.95
"""What they should be at batch 1."""
Tokens = list[list[int]]


def main() -> int:
    """Run the comparison; return the exit status."""
    options = _options()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads"
    )
    print(f"{options.model}, {PROMPT_TOKENS} prompt and {options.new_tokens} new tokens")
    ratios: dict[str, dict[int, float]] = {}
    failures: list[str] = []
    for name in options.dtypes.split(","):
        ratios[name], found = _compare(options, name)
        failures += [f"{name}: {failure}" for failure in found]
    for batch, wanted in ((1, SINGLE_RATIO), (8, TARGET_RATIO)):
        figures = ", ".join(f"{name} {ratio[batch]:.2f}" for name, ratio in ratios.items())
        met = all(ratio[batch] >= wanted for ratio in ratios.values())
        if batch > 1:
            verdict = "met" if met and not failures else "; ".join(["FAILED", *failures])
        else:
            verdict = "met" if met else "missed"
        print(f"batch {batch}, our loop / generate: {figures} (target {wanted}): {verdict}")
    return int(verdict != "met")


def _compare(options: argparse.Namespace, name: str) -> tuple[dict[int, float], list[str]]:
    """Return our loop's rate by batch, `generate`'s being 1, and what is wrong with its results."""
    dtype = getattr(torch, name)
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    reference.generation_config.eos_token_id = None  # every way runs to the same number of tokens
    config = {**reference.config.to_dict(), "architectures": [type(reference).__name__]}
    ours = assign_weights(build_skeleton(config), dict(reference.state_dict()))
    engine = TransformersEngine(ours, EngineLimits())
    clock = 1 if options.threads == 1 else 0
    ratios: dict[int, float] = {}
    failures: list[str] = []
    for batch in (1, 8):
        prompts = _prompts(batch, reference.config.vocab_size)
        ways: dict[str, Callable[[], Tokens]] = {
            "generate": lambda p=prompts: _generate(reference, p, options.new_tokens),
            "our loop": lambda p=prompts: _ours(engine, p, options.new_tokens),
        }
        if options.continuous:
            ways["continuous batching"] = lambda p=prompts: _continuous(reference, p, options.new_tokens)
        rates, tokens = _measure(ways, batch * options.new_tokens, options.rounds)
        print(f"\n{name}, batch {batch:<10} wall tok/s  ratio   cpu tok/s  ratio   tokens = generate's")
        for way, (wall, cpu) in rates.items():
            base_wall, base_cpu = rates["generate"]
            same = tokens[way] == tokens["generate"]
            print(
                f"  {way:<24} {wall:9.1f} {wall / base_wall:6.2f} {cpu:11.1f} {cpu / base_cpu:6.2f}   {same}"
            )
        if dtype is torch.float32 and tokens["our loop"] != tokens["generate"]:
            failures.append(f"other tokens than generate at batch {batch}")
        ratios[batch] = rates["our loop"][clock] / rates["generate"][clock]
    if not _is_batch_independent(ours, _prompts(8, reference.config.vocab_size)):
        failures.append("results depend on the batch")
    return ratios, failures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="default: what `make demo` fetched")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="float32,bfloat16", help="separated by commas")
    parser.add_argument("--new-tokens", type=positive, default=24)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--continuous", action="store_true", help="measure transformers' own, too")
    return parser.parse_args()


def _prompts(count: int, vocab: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab, (count, PROMPT_TOKENS), generator=generator).tolist()


def _measure(
    ways: dict[str, Callable[[], Tokens]], token_count: int, rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, Tokens]]:
    """Return tokens per second (wall, cpu) and the tokens, by way; the first round only warms up."""
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cpus: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, Tokens] = {}
    for round_index in range(rounds + 1):
        for way, work in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens[way] = work()
            if round_index:
                walls[way].append(token_count / (time.perf_counter() - wall))
                cpus[way].append(token_count / (time.process_time() - cpu))
    return {way: (statistics.median(walls[way]), statistics.median(cpus[way])) for way in ways}, tokens


def _generate(model: Any, prompts: Tokens, new_tokens: int) -> Tokens:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[:, PROMPT_TOKENS:].tolist()


def _continuous(model: Any, prompts: Tokens, new_tokens: int) -> Tokens:
    implementation = model.config._attn_implementation  # noqa: SLF001 - its only name; generate_batch changes it
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        progress_bar=False,
    )
    model.set_attn_implementation(implementation)
    ordered = sorted(results.values(), key=lambda result: prompts.index(list(result.prompt_ids)))
    return [list(result.generated_tokens) for result in ordered]


def _ours(engine: TransformersEngine, prompts: Tokens, new_tokens: int) -> Tokens:
    for i, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=new_tokens)
        engine.submit(Submit(session_id=SessionId(str(i)), prompt_token_ids=prompt, sampling=sampling))
    out = _run(engine)
    return [[token.token_id for token in out[str(i)]] for i in range(len(prompts))]


def _run(engine: TransformersEngine) -> dict[str, list[TokenOut]]:
    out: dict[str, list[TokenOut]] = {}
    while engine.has_work():
        for message in engine.step():
            if isinstance(message, TokenOut):
                out.setdefault(message.session_id, []).append(message)
    return out


def _is_batch_independent(model: nn.Module, prompts: Tokens) -> bool:
    """Say whether tokens and log probabilities of each request are bitwise those it gets alone."""

    def numbers(members: list[int]) -> dict[str, list[tuple[int, float | None]]]:
        engine = TransformersEngine(model, EngineLimits())
        for i in members:
            sampling = Sampling(max_tokens=8, top_logprobs=0, temperature=0.8 * (i % 2), seed=i)
            engine.submit(
                Submit(
                    session_id=SessionId(str(i)), prompt_token_ids=prompts[i][: 4 * i + 1], sampling=sampling
                )
            )
        return {key: [(t.token_id, t.logprob) for t in outs] for key, outs in _run(engine).items()}

    together = numbers(list(range(len(prompts))))
    alone = {key: outs for i in range(len(prompts)) for key, outs in numbers([i]).items()}
    print(f"our loop, bitwise independent of the batch: {together == alone}")
    return together == alone


if __name__ == "__main__":
    sys.exit(main())

"""Forward passes: token ids and KV stores in, rows of logits out.

Every decode pass of a model has the same arithmetic per row, whatever the batch:

- its matrix products take `group_rows` rows at a time (`row_linear`);
- it has so few rows that torch runs everything else on one thread in one piece (its grain is 32768 elements),
  because a piece's last elements go through scalar code, which rounds differently from vector code;
- for the same reason padding rows stand at the end where a row isn't a multiple of the vector width.

Prefill passes pack chunks of several sessions into groups of 32 or 64 rows where the same holds for them:
rows of whole vectors, cut between threads at whole vectors. Elsewhere each chunk has a pass of its own.

On CUDA a decode pass always has exactly `group_rows` rows, for reductions there are laid out by the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from services.worker.engine.adapted_rows import AdaptedModules
from services.worker.engine.attention import ATTENTION_NAME, DecodePlan, PrefillPlan, planned
from services.worker.engine.one_call_norm import norm_in_one_call
from services.worker.engine.row_linear import make_rows_uniform
from services.worker.engine.row_product import PROOFS
from stoker.errors import CheckpointInvalid
from stoker.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.engine.attention import ForwardPlan
    from services.worker.engine.sampling import Floats
    from services.worker.kv.kv_store import SessionKv

Row = TypeVar("Row")

GRAIN_ELEMENTS = 32768
"""at::internal::GRAIN_SIZE: below it, torch's CPU loops don't split."""
VECTOR_ELEMENTS = 64
"""Elements that torch's CPU loops take at once at most: two AVX-512 registers of bfloat16."""
UNBOUNDED_CONTEXT = 1 << 30

PREFILL_GROUP_ROWS = 64
"""Rows per matrix product in prefill; with 2 threads MKL takes no longer for 64 than for 16."""
SINGLE_THREAD_PREFILL_GROUP_ROWS = 32
"""With one thread 32 take two thirds of the time of 64, and are padded with half as many rows."""
EVEN_THREADS = frozenset({1, 2, 4, 8, 16, 32, 64})
"""Thread counts for which torch's CPU loops cut whole groups of aligned rows at vector boundaries."""

CUDA_GROUP_ROWS = 16
CPU_GROUP_ROWS = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
"""Measured on AVX-512 without bf16 units (benchmarks/engine_spike.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one session, to be prefilled."""

    kv: SessionKv
    start: int
    """Index of the first one in the session."""
    tokens: Sequence[int]
    needs_logits: bool
    adapter: AdapterWeights | None = None
    """The session's."""


class ModelRunner:
    """Runs one model's forward passes.

    Attributes:
        ranks: Processes that make each pass together.
    """

    ranks = 1

    def __init__(self, model: nn.Module, group_rows: int | None) -> None:
        config = model.config
        if config._attn_implementation != ATTENTION_NAME:  # type: ignore[union-attr]  # noqa: SLF001 - its only name
            raise ValueError(f"build the model with attn_implementation={ATTENTION_NAME!r}")
        parameter = next(model.parameters())
        self._model: nn.Module = model
        self._adapted = AdaptedModules(model)
        self.device, self.dtype = parameter.device, parameter.dtype
        self.vocab_size = int(config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
        self.max_context_tokens = _max_context_tokens(config)
        self._layer_count = int(config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        default = CUDA_GROUP_ROWS if self.device.type == "cuda" else CPU_GROUP_ROWS.get(parameter.dtype, 4)
        self._group_rows = group_rows or default
        widths = _row_widths(model)
        is_aligned = all(width % VECTOR_ELEMENTS == 0 for width in widths)
        self._tail_rows = 0 if is_aligned else -(-VECTOR_ELEMENTS // min(widths))
        self._prefill_rows = prefill_group_rows()
        self.packs_prefill = (
            is_aligned and self.device.type == "cpu" and torch.get_num_threads() in EVEN_THREADS
        )
        self._shares_attention = _shares_attention(parameter.dtype)
        norm_in_one_call(model)
        if not make_rows_uniform(model):
            self.packs_prefill = False
            self._prefill_rows = self._tail_rows = 0
            self._rows_per_pass = self._group_rows = 1
        elif self.device.type == "cuda":
            self._tail_rows = self._prefill_rows = 0
            self._rows_per_pass = self._group_rows
        else:
            fitting = GRAIN_ELEMENTS // max(widths) - self._tail_rows
            self._rows_per_pass = max(self._group_rows, fitting - fitting % self._group_rows)

    @property
    def group_rows(self) -> int:
        """Return how many rows a matrix product of a decode pass takes."""
        return self._group_rows

    @property
    def prefill_group_rows(self) -> int:
        """Return how many rows a matrix product of a prefill pass takes; 0: all at once."""
        return self._prefill_rows

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Cut a step's rows into passes."""
        for start in range(0, len(rows), self._rows_per_pass):
            yield rows[start : start + self._rows_per_pass]

    def decode(
        self,
        rows: Sequence[tuple[SessionKv, int, int]],
        logits_of: Sequence[int],
        adapters: Sequence[AdapterWeights | None],
    ) -> list[Floats]:
        """Feed one token per row: (its session's KV, its index in the session, its id).

        Args:
            rows: At most one pass's worth; KV room for each must have been reserved.
            logits_of: The rows whose logits are wanted.
            adapters: Each row's.

        Returns:
            One row of float32 logits, on the CPU, for each of `logits_of`.
        """
        padding = [0] * (align_up(len(rows) + self._tail_rows, self._group_rows) - len(rows))
        # Neighbouring slots next to each other: their sessions share attention calls.
        order = sorted(range(len(rows)), key=lambda row: -1 if (slot := rows[row][0].slot) is None else slot)
        place = {row: at for at, row in enumerate(order)}
        ordered = [rows[row] for row in order]
        plan = DecodePlan(
            [(kv, index) for kv, index, _ in ordered], self._group_rows, shares_calls=self._shares_attention
        )
        tokens = [token for _, _, token in ordered] + padding
        positions = [index for _, index, _ in ordered] + padding
        adding = self._adapted.adding(
            [adapters[row] for row in order], pass_rows=len(tokens), group_rows=self._group_rows
        )
        with adding:
            logits = self._run(plan, tokens, positions, [place[row] for row in logits_of])
        PROOFS.prove_next()  # after decode passes only, so never in a cold start
        return logits

    def prefill(self, chunks: Sequence[Chunk]) -> list[Floats | None]:
        """Feed consecutive tokens of some sessions; more than one only if `packs_prefill`.

        Returns:
            For each chunk its last token's float32 logits, on the CPU, if they are wanted.
        """
        count = sum(len(chunk.tokens) for chunk in chunks)
        padding = [0] * (align_up(count, self._prefill_rows) - count if self._prefill_rows else 0)
        tokens = [token for chunk in chunks for token in chunk.tokens] + padding
        positions = [i for c in chunks for i in range(c.start, c.start + len(c.tokens))] + padding
        ends = list(accumulate(len(chunk.tokens) for chunk in chunks))
        wanted = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.needs_logits]
        segments = [(chunk.kv, chunk.start, len(chunk.tokens)) for chunk in chunks]
        plan = PrefillPlan(segments, len(tokens), self._prefill_rows, self._group_rows)
        adapters = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        with self._adapted.adding(adapters, pass_rows=len(tokens), group_rows=self._prefill_rows):
            logits = iter(self._run(plan, tokens, positions, wanted))
        for chunk in chunks:
            self._check_layers(chunk.kv)
        return [next(logits) if chunk.needs_logits else None for chunk in chunks]

    def _check_layers(self, kv: SessionKv) -> None:
        if kv.layer_count != self._layer_count:
            raise CheckpointInvalid(
                f"{type(self._model).__name__} has {self._layer_count} layers, but {kv.layer_count} use "
                "attention with keys and values of their own: this engine can't serve it"
            )

    def close(self) -> None:
        """Let go of the model."""
        self._model = nn.Module()
        self._adapted = AdaptedModules(self._model)

    def _run(
        self, plan: ForwardPlan, tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> list[Floats]:
        input_ids = torch.tensor([tokens], device=self.device)
        position_ids = torch.tensor([positions], device=self.device)
        # Whole groups for the head, too: the first row stands in for what is missing.
        kept = [*wanted, *[wanted[0]] * (-len(wanted) % self._group_rows)] if wanted else []
        with planned(plan):
            if not wanted:
                self._model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)  # type: ignore[operator]
                return []
            out = self._model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=self.device),
            )
        rows: np.ndarray = out.logits[0].float().cpu().numpy()
        return list(rows[: len(wanted)])


def prefill_group_rows() -> int:
    """Return how many rows a matrix product of a prefill pass takes on a CPU, with as many threads as now."""
    return SINGLE_THREAD_PREFILL_GROUP_ROWS if torch.get_num_threads() == 1 else PREFILL_GROUP_ROWS


def _shares_attention(dtype: torch.dtype) -> bool:
    """Say whether the CPU's attention treats each session of a call as in a call of its own.

    With matrix units for small floats it first weighs the work of the whole call against packing the keys.
    """
    return dtype is torch.float32 or not torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - its only name


def _max_context_tokens(config: object) -> int:
    text = config.get_text_config()  # type: ignore[attr-defined]
    return int(getattr(text, "max_position_embeddings", None) or UNBOUNDED_CONTEXT)


def _row_widths(model: nn.Module) -> set[int]:
    """Return how many elements of a row the model's element-wise operations may take."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = int(text.num_attention_heads)
    head_width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    widths = {head_width, int(text.hidden_size)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features != text.vocab_size:
            widths.add(module.out_features)
        elif isinstance(module, Conv1D):
            widths.add(int(module.nf))
    return widths

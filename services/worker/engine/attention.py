"""The attention function we give to transformers' models: it keeps KV per session, outside the model.

Theory of operation. Models run without a transformers cache on one packed row of tokens, [1, T]. Each
attention layer calls `attend`, which finds in the active `ForwardPlan` what the T rows are: chunks of some
sessions' prompts (`PrefillPlan`), or single tokens of several sessions (`DecodePlan`). It stores the new keys
and values and attends session by session, or for several where the kernel keeps them apart, so the arithmetic
of a row never sees its neighbours.

Shapes: B batch (1 in what models pass; sessions that share a call), H query heads, K kv heads, G query heads
of a kv head, T rows of this pass, S tokens of a session, N slots, D head dim, P places in the pool.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.worker.kv.kv_store import SEEN_TOKENS, SLOT_TOKENS
from stoker.errors import CheckpointInvalid
from stoker.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.worker.kv.kv_store import SessionKv

ATTENTION_NAME = "stoker"
"""What a config's `_attn_implementation` must say for its model to call `attend`."""

_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "block_indices")
"""Arguments that change the result and that `attend` doesn't know."""

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001 - its name


class ForwardPlan(Protocol):
    """What the rows of one forward pass are."""

    def group_of(self, rows: int) -> int:
        """Return how many rows each matrix product gets that has `rows` in all; 0: all at once."""
        ...

    def attend(
        self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        """Store keys and values, return the attention's output as [B, T, H, D]."""
        ...


class Attention:
    """One layer's variant of attention."""

    __slots__ = ("scale", "softcap", "window")

    def __init__(self, scale: float | None, window: int | None, softcap: float | None) -> None:
        self.scale = scale
        self.window = window
        self.softcap = softcap

    def over(
        self,
        q_HTD: torch.Tensor,
        k_KSD: torch.Tensor,
        v_KSD: torch.Tensor,
        mask_TS: torch.Tensor | None,
        *,
        is_causal: bool,
    ) -> torch.Tensor:
        """Return [H, T, D]."""
        if self.softcap is not None:
            return self._softcapped(q_HTD, k_KSD, v_KSD, mask_TS, is_causal=is_causal, cap=self.softcap)
        return scaled_dot_product_attention(
            q_HTD[None],
            k_KSD[None],
            v_KSD[None],
            attn_mask=mask_TS,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=q_HTD.shape[0] != k_KSD.shape[0],
        )[0]

    def masked(
        self, q_BKGD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, mask_B11S: torch.Tensor
    ) -> torch.Tensor:
        """Return [B, K, G, D] of B sessions, on the CPU, without a look at which kernel to take."""
        out: torch.Tensor = _FLASH(q_BKGD, k_BKSD, v_BKSD, attn_mask=mask_B11S, scale=self.scale)[0]
        return out

    def _softcapped(  # noqa: PLR0913 - as `over`
        self,
        q_HTD: torch.Tensor,
        k_KSD: torch.Tensor,
        v_KSD: torch.Tensor,
        mask_TS: torch.Tensor | None,
        *,
        is_causal: bool,
        cap: float,
    ) -> torch.Tensor:
        """Attend with scores bounded by cap * tanh(score / cap), as Gemma 2 does."""
        repeats = q_HTD.shape[0] // k_KSD.shape[0]
        k_HSD, v_HSD = k_KSD.repeat_interleave(repeats, 0), v_KSD.repeat_interleave(repeats, 0)
        scale = q_HTD.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.tanh((q_HTD @ k_HSD.transpose(1, 2)) * scale / cap) * cap
        if is_causal:
            mask_TS = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask_TS is not None:
            scores = scores.masked_fill(~mask_TS, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q_HTD.dtype) @ v_HSD


class PrefillPlan:
    """Consecutive tokens of some sessions, one session after the other; the rest of the T rows is padding.

    Args:
        segments: For each session its KV, the index of its first token here, and how many there are.
        rows: T.
        group_rows: Rows per matrix product of T rows; 0: all at once.
        head_rows: Rows per matrix product of the rows whose logits are wanted.
    """

    __slots__ = ("_group_rows", "_head_rows", "_rows", "segments")

    def __init__(
        self, segments: Sequence[tuple[SessionKv, int, int]], rows: int, group_rows: int, head_rows: int
    ) -> None:
        self.segments = segments
        self._rows = rows
        self._group_rows = group_rows
        self._head_rows = head_rows

    def group_of(self, rows: int) -> int:
        """See `ForwardPlan`."""
        return self._group_rows if rows == self._rows else self._head_rows

    def attend(
        self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        """See `ForwardPlan`."""
        heads, width = q_BHTD.shape[1], v_BKTD.shape[-1]
        kv_2KTD = _stack(k_BKTD, v_BKTD)
        out_THD = q_BHTD.new_zeros((q_BHTD.shape[2], heads, width))
        row = 0
        for kv, start, count in self.segments:
            k_KSD, v_KSD = kv.write(layer, start, kv_2KTD[:, :, row : row + count])
            tokens = k_KSD.shape[1]
            is_plain = start == 0 and (how.window is None or tokens <= how.window)
            mask_TS = None if is_plain else _causal_mask(start, count, tokens, how.window, q_BHTD.device)
            q_HTD = q_BHTD[0, :, row : row + count].contiguous()
            out_HTD = how.over(q_HTD, k_KSD, v_KSD[..., :width], mask_TS, is_causal=is_plain)
            out_THD[row : row + count] = out_HTD.transpose(0, 1)
            row += count
        return out_THD[None]


class DecodePlan:
    """One token of some session per row; rows beyond `rows` are padding.

    On a CPU a row of a session that fits a slot sees a whole number of blocks, masked behind its own token,
    so that sessions of as many blocks in neighbouring slots share a call. The kernel works through each row
    of such a call by itself, with the same products in the same order as in a call of its own; how many
    blocks there are depends on the session alone.

    Args:
        rows: For each row its session's KV and the token's index in the session. Rows of one session are
            consecutive and ascending; those of neighbouring slots should be, too.
        group_rows: Rows per matrix product.
        shares_calls: Whether several sessions may share an attention call.
    """

    __slots__ = ("_calls", "_group_rows", "_last", "_masks", "_places", "_pooled", "rows")

    def __init__(
        self, rows: Sequence[tuple[SessionKv, int]], group_rows: int, *, shares_calls: bool = True
    ) -> None:
        self.rows = rows
        self._group_rows = group_rows
        self._last = max(index for _, index in rows)
        self._calls = _shared_calls(rows) if shares_calls else [(i, i + 1) for i in range(len(rows))]
        self._pooled = all(kv.slot is not None for kv, _ in rows)
        self._places: torch.Tensor | None = None
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        for kv, index in rows:
            kv.note_written(index + 1)

    def group_of(self, rows: int) -> int:  # noqa: ARG002 - all products of a decode pass are alike
        """See `ForwardPlan`."""
        return self._group_rows

    def attend(
        self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        """See `ForwardPlan`."""
        heads, width = q_BHTD.shape[1], v_BKTD.shape[-1]
        kv_heads = k_BKTD.shape[1]
        # The query heads of one kv head become its query rows: no copies of keys.
        q_TKGD = q_BHTD[0].transpose(0, 1).reshape(-1, kv_heads, heads // kv_heads, q_BHTD.shape[-1])
        self._write(layer, k_BKTD, v_BKTD)
        out_TKGD = q_TKGD.new_zeros((*q_TKGD.shape[:3], width))
        reach = SLOT_TOKENS if how.window is None else min(SLOT_TOKENS, how.window)
        in_blocks = q_TKGD.device.type == "cpu" and how.softcap is None
        shares = in_blocks and self._last < reach
        for first, end in self._calls if shares else [(i, i + 1) for i in range(len(self.rows))]:
            if in_blocks and self.rows[first][1] < reach:
                out_BKGD = self._over_blocks(layer, first, q_TKGD[first:end], how)
                out_TKGD[first:end] = out_BKGD if out_BKGD.shape[-1] == width else out_BKGD[..., :width]
            else:
                out_TKGD[first] = self._over_exactly(layer, first, q_TKGD[first], width, how)
        return out_TKGD.reshape(1, -1, heads, width)

    def _write(self, layer: int, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor) -> None:
        """Store each row's keys and values: in one call each where all are in the pool."""
        count = len(self.rows)
        if not self._pooled or k_BKTD.shape[-1] != v_BKTD.shape[-1]:
            kv_2KTD = _stack(k_BKTD, v_BKTD)
            for row, (kv, index) in enumerate(self.rows):
                kv.write(layer, index, kv_2KTD[:, :, row : row + 1])
            return
        pool, heads, width = self.rows[0][0].pool, k_BKTD.shape[1], k_BKTD.shape[3]
        if self._places is None:
            starts_T1 = torch.tensor([[kv.slot * heads * SLOT_TOKENS + index] for kv, index in self.rows])  # type: ignore[operator]
            self._places = (starts_T1 + torch.arange(heads) * SLOT_TOKENS).view(-1)
        for store_PD, new_BKTD in zip(pool.places(layer), (k_BKTD, v_BKTD), strict=True):
            # [T, K, D] is how models make them, so this takes no copy.
            new_PD = new_BKTD[0].transpose(0, 1)[:count].reshape(-1, width)
            store_PD.index_copy_(0, self._places, new_PD)

    def _over_blocks(self, layer: int, first: int, q_BKGD: torch.Tensor, how: Attention) -> torch.Tensor:
        kv, index = self.rows[first]
        tokens, count = align_up(index + 1, SEEN_TOKENS), q_BKGD.shape[0]
        if kv.slot is not None:
            k_BKSD, v_BKSD = kv.pool.seen(layer, kv.slot, count, tokens)
        else:
            k_BKSD, v_BKSD = kv.layer(layer)[:, None, :, :tokens]
        mask_B11S = self._masks.get((first, count))
        if mask_B11S is None:
            last_B = torch.tensor([index for _, index in self.rows[first : first + count]])
            hidden_BS = torch.arange(tokens) > last_B[:, None]
            mask_B11S = q_BKGD.new_zeros(hidden_BS.shape).masked_fill_(hidden_BS, float("-inf"))[
                :, None, None
            ]
            self._masks[first, count] = mask_B11S
        return how.masked(q_BKGD, k_BKSD, v_BKSD, mask_B11S)

    def _over_exactly(
        self, layer: int, row: int, q_KGD: torch.Tensor, width: int, how: Attention
    ) -> torch.Tensor:
        kv, index = self.rows[row]
        start = 0 if how.window is None else max(0, index + 1 - how.window)
        k_KSD, v_KSD = kv.layer(layer)[:, :, start : index + 1]
        return how.over(q_KGD, k_KSD, v_KSD[..., :width], None, is_causal=False)


def _shared_calls(rows: Sequence[tuple[SessionKv, int]]) -> list[tuple[int, int]]:
    """Return first and end of each run of rows in neighbouring slots with as many blocks."""
    calls: list[tuple[int, int]] = []
    for row, (kv, index) in enumerate(rows):
        if calls:
            before, its_index = rows[row - 1]
            if (
                kv.slot is not None
                and before.slot is not None
                and kv.slot == before.slot + 1
                and index // SEEN_TOKENS == its_index // SEEN_TOKENS
            ):
                calls[-1] = (calls[-1][0], row + 1)
                continue
        calls.append((row, row + 1))
    return calls


def _stack(k_BKTD: torch.Tensor, v_BKTD: torch.Tensor) -> torch.Tensor:
    """Return keys and values as [2, K, T, D]; values narrower than keys are padded with zeros."""
    missing = k_BKTD.shape[-1] - v_BKTD.shape[-1]
    return torch.cat((k_BKTD, pad(v_BKTD, (0, missing)) if missing else v_BKTD))


def _causal_mask(
    start: int, rows: int, tokens: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Return a boolean [T, S]: row t is token start + t, which sees itself and its window's past."""
    query_T1 = torch.arange(start, start + rows, device=device)[:, None]
    key_1S = torch.arange(tokens, device=device)[None]
    mask_TS = key_1S <= query_T1
    return mask_TS if window is None else mask_TS & (key_1S > query_T1 - window)


class _Active(threading.local):
    plan: ForwardPlan | None = None


_ACTIVE = _Active()


def active_plan() -> ForwardPlan | None:
    """Return the plan of the forward pass that this thread is in."""
    return _ACTIVE.plan


@contextmanager
def planned(plan: ForwardPlan) -> Iterator[None]:
    """Make `plan` the one that this thread's forward pass follows."""
    _ACTIVE.plan = plan
    try:
        yield
    finally:
        _ACTIVE.plan = None


def attend(  # noqa: PLR0913, PLR0917 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the plan knows the mask
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `AttentionInterface` asks for it; q, k, v are [B, H or K, T, D]."""
    plan = _ACTIVE.plan
    if plan is None:
        raise RuntimeError("the model ran outside of an engine's forward pass; run it through the engine")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CheckpointInvalid(
                f"{type(module).__name__} uses attention with `{name}`, which this engine doesn't support"
            )
    how = Attention(scaling, sliding_window, softcap)
    return plan.attend(int(module.layer_idx), query, key, value, how), None  # type: ignore[arg-type]


def register_attention() -> None:
    """Make `attend` known to transformers under `ATTENTION_NAME`; it makes no mask for it. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)

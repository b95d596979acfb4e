"""What decides the bits of an engine's results, as one comparable line.

Two replicas with equal lines give bitwise equal tokens and log probabilities for the same session, so one can
go on exactly where the other stopped. Between different lines the last bits of a logit may differ: by about
1e-6 relative in float32, 1e-2 in bfloat16, which changes a token only where two are nearly as likely.
"""

from __future__ import annotations

import torch

from stoker import __version__

REVISION = 1
"""Of this engine's own arithmetic, as long as one version of the package is built more than once.

Raise it with any change after which the same session may give other bits on the same machine: how the rows of
a product are grouped or its columns cut, the tokens of an attention block, the order of a sum, a dtype in
between, a kernel in place of another, how a token is drawn. Not for what is proven to keep every bit.
"""


def numerics(  # noqa: PLR0913 - one per thing that decides
    *,
    engine: str,
    dtype: torch.dtype,
    device: torch.device,
    group_rows: int,
    prefill_group_rows: int,
    prefill_chunk_tokens: int,
    ranks: int = 1,
) -> str:
    """Return the line of an engine in this process.

    Args:
        engine: Its name.
        dtype: Of its weights.
        device: It computes on; a processor counts by its instruction set, its units for small floats, and
            this process's threads.
        group_rows: Rows per matrix product of a decode pass.
        prefill_group_rows: Rows per matrix product of a prefill pass; 0: all at once.
        prefill_chunk_tokens: Where prompts are cut.
        ranks: Into how many parts products are cut and summed.
    """
    if device.type == "cuda":
        place = f"cuda:{torch.cuda.get_device_name(device).replace(' ', '-')}"
    else:
        instructions = "+".join((torch.backends.cpu.get_cpu_capability(), *_small_float_units()))
        place = f"{device.type}:{instructions} threads={torch.get_num_threads()}"
    return (
        f"{engine} stoker={__version__} arithmetic={REVISION} torch={torch.__version__} "
        f"dtype={str(dtype).removeprefix('torch.')} device={place} group_rows={group_rows} "
        f"prefill_group_rows={prefill_group_rows} prefill_chunk={prefill_chunk_tokens}"
        + (f" ranks={ranks}" if ranks > 1 else "")
    )


def _small_float_units() -> list[str]:
    """Return what this processor has for 16-bit floats: by it libraries and `row_linear` choose products."""
    units = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),  # noqa: SLF001 - its only name
        "amx_tile": torch.cpu._is_amx_tile_supported(),  # noqa: SLF001 - its only name
        "amx_fp16": torch.cpu._is_amx_fp16_supported(),  # noqa: SLF001 - its only name
    }
    return [name for name, is_there in units.items() if is_there]

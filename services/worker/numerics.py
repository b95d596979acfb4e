"""What decides the bits of an engine's results, as one comparable line.

Two replicas with equal lines give bitwise equal tokens and log probabilities for the same session, so one can
go on exactly where the other stopped. Between different lines the last bits of a logit may differ: by about
1e-6 relative in float32, 1e-2 in bfloat16, which changes a token only where two are nearly as likely.
"""

from __future__ import annotations

import torch

from stoker import __version__


def numerics(
    *, engine: str, dtype: torch.dtype, device: torch.device, group_rows: int, prefill_chunk_tokens: int
) -> str:
    """Return the line of an engine in this process.

    Args:
        engine: Its name.
        dtype: Of its weights.
        device: It computes on; a processor counts by its instruction set and this process's threads.
        group_rows: Rows per matrix product of a decode pass.
        prefill_chunk_tokens: Where prompts are cut.
    """
    if device.type == "cuda":
        place = f"cuda:{torch.cuda.get_device_name(device).replace(' ', '-')}"
    else:
        place = f"{device.type}:{torch.backends.cpu.get_cpu_capability()} threads={torch.get_num_threads()}"
    return (
        f"{engine} stoker={__version__} torch={torch.__version__} dtype={str(dtype).removeprefix('torch.')} "
        f"device={place} group_rows={group_rows} prefill_chunk={prefill_chunk_tokens}"
    )

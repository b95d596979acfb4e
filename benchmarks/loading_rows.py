"""One row of `loading.py`: load a checkpoint once, in this fresh process, and say what it took.

Run by `loading.py` with the python that has the row's library:

    python loading_rows.py ROW '{"folder": ..., ...}'

Everything is imported first, then `ready` is printed; the parent prepares the page cache and sends a line;
the clock runs from there until every tensor is there and one byte of each of its pages has been read, so that
lazy loaders pay for what they put off. The answer is one line of JSON.
"""

# ruff: noqa: PLC0415 - a row imports its own library only, before its clock starts

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
_THREADS = 4

Tensors = Mapping[str, Any]
Load = Callable[[], tuple[Tensors, Mapping[str, float]]]
"""Loads; returns tensors by name and what else was measured. Made by a row's function after its imports."""


class NotHere(Exception):
    """The library cannot run on this machine; says why."""


def touch(tensors: Iterable[Any]) -> int:
    """Read one byte of every page of every tensor; return their sum, the same for every right loader."""
    import torch

    return sum(
        int(tensor.detach().reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum(dtype=torch.int64))
        for tensor in tensors
        if tensor.numel()
    )


def stoker(paths: dict[str, str]) -> Load:
    """The store daemon's pool, mapped into this process: tensors are the pool's memory."""
    from stoker.attach import attach
    from stoker.attach.tensors import tensors

    def load() -> tuple[Tensors, Mapping[str, float]]:
        began = time.perf_counter()
        attachment = attach(paths["socket"], paths["folder"], holder="benchmark")
        found = tensors(attachment)
        attached = time.perf_counter() - began
        attachment.wait_all()
        return found, {"attach_seconds": attached}

    return load


def stoker_library(paths: dict[str, str]) -> Load:
    """`stoker.load_tensors` without a daemon: its memory is taken inside the clock."""
    import stoker as library

    if not hasattr(library, "load_tensors"):
        raise NotHere("this version of stoker has no load_tensors")
    return lambda: (library.load_tensors(paths["folder"], daemon=None), {})


def safetensors_mmap(paths: dict[str, str]) -> Load:
    """`safetensors.torch.load_file`: maps the file."""
    from safetensors.torch import load_file

    return lambda: (load_file(paths["file"]), {})


def safetensors_read(paths: dict[str, str]) -> Load:
    """`safetensors.torch.load` of the file's bytes."""
    from safetensors.torch import load

    return lambda: (load(Path(paths["file"]).read_bytes()), {})


def transformers(paths: dict[str, str]) -> Load:
    """`AutoModelForCausalLM.from_pretrained`: the module is built inside the clock."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401 - imported before the clock starts
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load() -> tuple[Tensors, Mapping[str, float]]:
        model = AutoModelForCausalLM.from_pretrained(paths["folder"], dtype="auto")
        return dict(model.named_parameters()), {}

    return load


def runai_streamer(paths: dict[str, str]) -> Load:
    """Run:ai model streamer with its defaults."""
    from runai_model_streamer import SafetensorsStreamer

    def load() -> tuple[Tensors, Mapping[str, float]]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(paths["file"])
            return dict(streamer.get_tensors()), {}

    return load


def fastsafetensors(paths: dict[str, str]) -> Load:
    """The library without GPUDirect Storage, onto the CPU."""
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> tuple[Tensors, Mapping[str, float]]:
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True, max_threads=_THREADS)
        loader.add_filenames({0: [paths["file"]]})
        buffer = loader.copy_files_to_device()
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}, {}

    return load


def instanttensor(paths: dict[str, str]) -> Load:
    """InstantTensor, where it agrees to load without a GPU."""
    import instanttensor as library

    def load() -> tuple[Tensors, Mapping[str, float]]:
        try:
            with library.safe_open(paths["file"], framework="pt", device="cpu") as file:
                return dict(file.tensors()), {}
        except (ValueError, RuntimeError, AssertionError) as error:
            raise NotHere(f"{type(error).__name__}: {error}") from error

    return load


def tensorizer(paths: dict[str, str]) -> Load:
    """Read from its own format, with as many readers as it chooses."""
    from tensorizer import TensorDeserializer

    return lambda: (dict(TensorDeserializer(paths["tensorized"], device="cpu")), {})


def torch_mmap(paths: dict[str, str]) -> Load:
    """`torch.load(mmap=True)` from torch's own format."""
    import torch

    return lambda: (torch.load(paths["pickled"], mmap=True, weights_only=True), {})


ROWS: dict[str, Callable[[dict[str, str]], Load]] = {
    function.__name__: function
    for function in (
        stoker,
        stoker_library,
        safetensors_mmap,
        safetensors_read,
        transformers,
        runai_streamer,
        fastsafetensors,
        instanttensor,
        tensorizer,
        torch_mmap,
    )
}


def write_other_formats(paths: dict[str, str]) -> None:
    """Write the checkpoint as tensorizer and torch have it, where it is not there yet."""
    import torch
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    found = load_file(paths["file"])
    for key, write in (
        ("pickled", lambda path: torch.save(found, path)),
        ("tensorized", lambda path: _tensorize(TensorSerializer, found, path)),
    ):
        final = Path(paths[key])
        if not final.exists():
            partial = final.with_suffix(".partial")
            write(str(partial))
            partial.rename(final)


def _tensorize(serializer: Any, found: Tensors, path: str) -> None:
    writer = serializer(path)
    writer.write_state_dict(found)
    writer.close()


def main() -> int:
    """Run the command."""
    row, paths = sys.argv[1], json.loads(sys.argv[2])
    if row == "write_other_formats":
        write_other_formats(paths)
        return 0
    try:
        load = ROWS[row](paths)
        import torch  # every row pays for this import before the clock

        torch.set_num_threads(1)
        torch.zeros(PAGE_BYTES, dtype=torch.uint8)[::PAGE_BYTES].sum(dtype=torch.int64)
        gc.collect()  # what the imports left behind would otherwise be collected inside somebody's clock
        print("ready", flush=True)
        sys.stdin.readline()
        began_cpu, began = time.process_time(), time.perf_counter()
        found, more = load()
        loaded = time.perf_counter()
        checksum = touch(found.values())
        ended = time.perf_counter()
    except (NotHere, ImportError) as error:
        print(json.dumps({"not_here": str(error)}), flush=True)
        return 0
    answer = {
        "wall_seconds": ended - began,
        "load_seconds": loaded - began,
        "touch_seconds": ended - loaded,
        "cpu_seconds": time.process_time() - began_cpu,
        "tensor_bytes": sum(tensor.nbytes for tensor in found.values()),
        "checksum": checksum,
        **more,
    }
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rows of `loading.py`: each loads a checkpoint once, in a fresh process whose imports are done.

Run by `loading.py` with the python that has the rows' libraries:

    python loading_rows.py serve '["ROW", ...]'
    python loading_rows.py write_other_formats '{"file": ..., ...}'

`serve` imports the libraries of all its rows once and says which of them cannot run, with the reason. Then
it forks a process for every line `{"row": ..., "paths": ...}` that it reads: importing torch and
transformers takes longer than a load, and no row's clock holds it. The process collects what imports left
behind, takes as its own what a fork leaves to be copied and faulted in, prints `ready` and waits for a line;
meanwhile the page cache is prepared. The clock runs from that line until every tensor is there and one byte
of each of its pages has been read, so that lazy loaders pay for what they put off. A loader that hands
tensors over one by one has them read one by one. The answer is one line of JSON.
"""

# ruff: noqa: PLC0415 - a row imports its own library only, before its clock starts

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
_THREADS = 4
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MOST_SHARED_BYTES = 1 << 30

Tensors = Mapping[str, Any]
Paths = dict[str, str]
Load = Callable[[Paths, dict[str, float]], Iterable[Any]]
"""Loads what the paths name; returns the tensors, or hands them over as they come, and may note what else it
measured. Made by a row's function, which imports."""


class NotHere(Exception):
    """The library cannot run on this machine; says why."""


def touch(tensor: Any) -> int:
    """Read one byte of every page of a tensor; return their sum, the same for every right loader.

    By numpy, which takes three quarters of torch's time at most: this is the bench's own share of every row.
    """
    import numpy as np
    import torch

    if not tensor.numel():
        return 0
    plain = tensor.detach() if tensor.requires_grad else tensor
    whole = plain if plain.dim() and plain.is_contiguous() else plain.reshape(-1)
    pages = whole.view(torch.uint8).numpy().reshape(-1)[::PAGE_BYTES]
    return int(pages.sum(dtype=np.int64))


def stoker() -> Load:
    """The store daemon's pool, mapped into this process: tensors are the pool's memory.

    What has arrived is entered into the page table piece by piece, as workers do (`PlacedWeights`).
    """
    from stoker.attach import attach
    from stoker.attach.tensors import tensors

    def load(paths: Paths, noted: dict[str, float]) -> Iterator[Any]:
        began = time.perf_counter()
        attachment = attach(paths["socket"], paths["folder"], holder="benchmark")
        found = tensors(attachment)
        noted["attach_seconds"] = time.perf_counter() - began
        mapped = [0] * attachment.file_count
        for name, each in found.items():
            attachment.wait_tensor(name)
            file = attachment.tensors[name].file
            if (ready := attachment.ready_bytes(file)) > mapped[file]:
                attachment.map_pages(file, mapped[file], ready)
                mapped[file] = ready
            yield each
        attachment.wait_all()

    return load


def stoker_library() -> Load:
    """`stoker.load_tensors` without a daemon: its memory is taken inside the clock."""
    import stoker as library

    return lambda paths, _: library.load_tensors(paths["folder"], daemon=None).values()


def safetensors_mmap() -> Load:
    """`safetensors.torch.load_file`: maps the file."""
    from safetensors.torch import load_file

    return lambda paths, _: load_file(paths["file"]).values()


def safetensors_read() -> Load:
    """`safetensors.torch.load` of the file's bytes."""
    from safetensors.torch import load

    return lambda paths, _: load(Path(paths["file"]).read_bytes()).values()


def transformers() -> Load:
    """`AutoModelForCausalLM.from_pretrained`: the module is built inside the clock."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401 - imported before the clock starts
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(paths: Paths, _: dict[str, float]) -> Iterable[Any]:
        model = AutoModelForCausalLM.from_pretrained(paths["folder"], dtype="auto")
        return list(model.parameters())

    return load


def runai_streamer() -> Load:
    """Run:ai model streamer with its defaults; it hands tensors over as they come."""
    from runai_model_streamer import SafetensorsStreamer

    def load(paths: Paths, _: dict[str, float]) -> Iterator[Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(paths["file"])
            for _name, each in streamer.get_tensors():
                yield each

    return load


def fastsafetensors() -> Load:
    """The library without GPUDirect Storage, onto the CPU."""
    from fastsafetensors import SafeTensorsFileLoader

    def load(paths: Paths, _: dict[str, float]) -> Iterable[Any]:
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True, max_threads=_THREADS)
        loader.add_filenames({0: [paths["file"]]})
        buffer = loader.copy_files_to_device()
        return [buffer.get_tensor(name) for name in loader.get_keys()]

    return load


def instanttensor() -> Load:
    """InstantTensor, where it agrees to load without a GPU."""
    import instanttensor as library

    def load(paths: Paths, _: dict[str, float]) -> Iterable[Any]:
        try:
            with library.safe_open(paths["file"], framework="pt", device="cpu") as file:
                return dict(file.tensors()).values()
        except (ValueError, RuntimeError, AssertionError) as error:
            raise NotHere(f"{type(error).__name__}: {error}") from error

    return load


def tensorizer() -> Load:
    """Read from its own format, with as many readers as it chooses."""
    from tensorizer import TensorDeserializer

    return lambda paths, _: TensorDeserializer(paths["tensorized"], device="cpu").values()


def torch_mmap() -> Load:
    """`torch.load(mmap=True)` from torch's own format."""
    import torch

    return lambda paths, _: torch.load(paths["pickled"], mmap=True, weights_only=True).values()


ROWS: dict[str, Callable[[], Load]] = {
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


def serve(names: list[str]) -> None:
    """Import, say which rows cannot run here, and fork a process per line until there is no more."""
    import torch  # every row pays for this import before the clock

    torch.set_num_threads(1)  # no thread may be there when this process forks
    loads: dict[str, Load] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            loads[name] = ROWS[name]()
        except ImportError as error:
            missing[name] = f"{error}".splitlines()[0]
    say({"missing": missing})
    while line := hear():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            measure(loads[order["row"]], order["paths"])
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


def measure(load: Load, paths: Paths) -> None:
    """Run a row once in this process; see the module."""
    import torch

    touch(torch.zeros(PAGE_BYTES, dtype=torch.uint8))
    gc.collect()  # what the imports left behind would otherwise be collected inside somebody's clock
    gc.freeze()
    own_all_memory()
    say("ready")
    hear()
    noted: dict[str, float] = {}
    checksum = 0
    kept = []
    try:
        began_cpu, began = time.process_time(), time.perf_counter()
        for tensor in load(paths, noted):
            checksum += touch(tensor)
            kept.append(tensor)
        ended = time.perf_counter()
    except NotHere as error:
        say({"not_here": str(error).splitlines()[0]})
        return
    cpu_seconds = time.process_time() - began_cpu
    byte_count = sum(tensor.nbytes for tensor in kept)
    say(
        {
            "wall_seconds": ended - began,
            "cpu_seconds": cpu_seconds,
            "tensor_bytes": byte_count,
            "checksum": checksum,
            **noted,
        }
    )


def own_all_memory() -> None:
    """Make this process what one is that has imported by itself, before its clock.

    A fork shares written memory until somebody writes to it, and has no page of a library in its page table:
    its load would copy the one and fault the other in.
    """
    libc = ctypes.CDLL(None)
    with Path("/proc/self/maps").open() as maps:
        ranges = [line.split(maxsplit=5) for line in maps]
    for addresses, access, _, _, inode, *_ in ranges:
        first, last = (int(each, 16) for each in addresses.split("-"))
        if access == "rw-p" and last - first < _MOST_SHARED_BYTES:  # larger ones are reserved, not used
            advice = _MADV_POPULATE_WRITE
        elif access in {"r-xp", "r--p"} and inode != "0":
            advice = _MADV_POPULATE_READ
        else:
            continue
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def say(what: object) -> None:
    """Print a line for `loading.py`."""
    print(json.dumps(what), flush=True)


def hear() -> str:
    """Return a line of `loading.py`, which never sends two at once; unbuffered: forked processes read too."""
    return os.read(0, 65536).decode()


def main() -> int:
    """Run the command."""
    what, argument = sys.argv[1], json.loads(sys.argv[2])
    if what == "write_other_formats":
        write_other_formats(argument)
    else:
        serve(argument)
    return 0


if __name__ == "__main__":
    sys.exit(main())

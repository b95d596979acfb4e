"""`stoker.load_tensors` and `stoker.load_model`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from stoker.loader.daemon import AUTO
from stoker.loader.devices import device_named, tensors_on
from stoker.loader.file_check import Verify
from stoker.loader.sources import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_tensors(
    path: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    daemon: str | os.PathLike[str] | None = AUTO,
    verify: str = Verify.FIRST,
) -> dict[str, torch.Tensor]:
    """Load a whole checkpoint and return its tensors by name, in execution order.

    Blocks until every byte is in memory. On the CPU nothing is copied that is in memory already: tensors are
    the store daemon's pool, or the page cache's pages, or memory that was read into; writing to one changes
    this process's copy only. Tied names share one tensor.

    Example:
        tensors = stoker.load_tensors("llama-3-8b")
        tensors["model.norm.weight"].mean()

    Args:
        path: A folder of safetensors, converted or not; with a daemon also a uri that it knows.
        device: Where the tensors go, e.g. `cpu` or `cuda:0`.
        daemon: `auto` asks the store daemon of this host if there is one; a path names its attach socket
            or run folder; None asks nobody.
        verify: When the digests of a converted checkpoint are compared with what is read without a daemon:
            `first` = with what comes from the disk, not with what the page cache has already; `always`;
            `never`. A daemon has a setting of its own (`STOKER_STORE_VERIFY_DISK`).

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, must be converted first, or has a dtype that torch lacks.
        InvalidRequest: There is no such device, or no such `verify`.
        DoesNotFit: Memory is too small.
        LoadFailed: The bytes did not come.
        PeerError: A daemon is needed or was named, and none answers.
    """
    target = device_named(device)
    source = open_source(path, daemon=daemon, verify=verify)
    try:
        source.receive()
        return tensors_on(source, target)
    finally:
        source.close()


def load_model(  # noqa: PLR0913 - what a caller may choose
    path: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    daemon: str | os.PathLike[str] | None = AUTO,
    attn_implementation: str | None = None,
    tp_size: int = 1,
    verify: str = Verify.FIRST,
) -> PreTrainedModel:
    """Load a transformers model, ready to run, in eval mode.

    While the weights come, the modules are built; then the tensors become their parameters. On the CPU in the
    stored dtype the model computes from the memory that `load_tensors` describes, uncopied.

    Example:
        model = stoker.load_model("llama-3-8b", device="cuda:0")
        model.generate(**tokenizer("Hello", return_tensors="pt").to("cuda:0"))

    Args:
        path: As for `load_tensors`; its `config.json` names an architecture of transformers.
        device: Where the model runs.
        dtype: Of the floating parameters, e.g. `torch.bfloat16`, "float32"; "auto" = what `config.json` says;
            None = as stored, which copies nothing.
        daemon: As for `load_tensors`.
        attn_implementation: As for `from_pretrained`, e.g. `sdpa` or `eager`; None lets transformers choose.
        tp_size: Tensor-parallel ranks: all processes of torch's default process group, as many, call this for
            a checkpoint made by `stoker convert --tensor-parallel`; each reads its own file only.
        verify: As for `load_tensors`.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, quantised, needs code of its own, or doesn't fit its `config.json`.
        InvalidRequest: There is no such device, dtype or `verify`, or the ranks are not as many as processes.
        DoesNotFit: Memory is too small.
        LoadFailed: The bytes did not come.
        PeerError: A daemon is needed or was named, and none answers.
    """
    target = device_named(device)
    rank = None
    if tp_size != 1:
        from stoker.loader.ranks import rank_of_this_process  # noqa: PLC0415 - imports transformers, slowly

        rank = rank_of_this_process(tp_size)
    source = open_source(path, daemon=daemon, rank=rank, verify=verify)
    return model_from(source, target, dtype=dtype, attn_implementation=attn_implementation)


def model_from(  # noqa: PLR0913 - what a caller may choose
    source: Source,
    device: torch.device,
    *,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
    model_class: Any = None,
    name: str | None = None,
) -> PreTrainedModel:
    """Receive a source, build its model meanwhile, put the tensors in; takes over the source.

    Args:
        source: Where the bytes come from.
        device: Where the model runs.
        dtype: As for `load_model`.
        attn_implementation: As for `load_model`.
        config: Instead of the checkpoint's own.
        model_class: Instead of what the config names.
        name: What `model.name_or_path` says; None = the source's location.

    Raises:
        StokerError: See `load_model`.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="stoker-weights") as receiver:
            receiving = receiver.submit(source.receive)
            from stoker.loader.model_build import build, finish  # noqa: PLC0415 - imports transformers, slowly

            blueprint = build(
                source,
                device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                config=config,
                model_class=model_class,
                name=name or source.location,
            )
            receiving.result()
        return finish(blueprint, tensors_on(source, device))
    finally:
        source.close()

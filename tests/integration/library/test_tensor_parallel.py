"""Ranks in processes of their own, over gloo: together they are the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import stoker
from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import open_checkpoint
from stoker.v1.checkpoint_store_pb2 import GetStatusRequest
from tests.integration.store.daemon import running
from tests.unit.loader.tiny_models import logits, tiny_model, token_ids

PROCESS = Path(__file__).with_name("rank_process.py")


def run_ranks(folder: Path, daemon: str, meeting: Path, ranks: int) -> list[list[dict]]:
    """What each rank says when it loads from the disk, then from the daemon."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    finished = subprocess.run(
        [sys.executable, PROCESS, str(ranks), meeting, folder, daemon],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads(Path(f"{meeting}.rank-{rank}").read_text()) for rank in range(ranks)]


def test_two_ranks_compute_what_one_process_does_and_get_half_each_from_disk_and_daemon(tmp_path) -> None:
    """Sums are made in another order, so logits agree to 1e-5 of their size, and greedy tokens exactly."""
    tiny_model("llama_tied").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole")
    convert(tmp_path / "hf", tmp_path / "cut", tensor_parallel=2)

    with running(tmp_path / "store") as daemon:
        answers = run_ranks(tmp_path / "cut", daemon.attach_socket, tmp_path / "meeting", 2)
        with daemon.stub() as stub:
            held = {found.checkpoint.uri for found in stub.GetStatus(GetStatusRequest()).checkpoints}

    wanted = stoker.load_model(tmp_path / "whole", daemon=None)
    with torch.no_grad():
        tokens = wanted.generate(token_ids(), max_new_tokens=4, do_sample=False)[0].tolist()
    file_bytes = open_checkpoint(tmp_path / "whole").weight_bytes
    assert [[way["source"] for way in rank] for rank in answers] == [["LocalSource", "PoolSource"]] * 2
    assert held == {str(tmp_path / "cut")}
    for answer in (way for rank in answers for way in rank):
        assert answer["tokens"] == tokens
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits(wanted), rtol=1e-5, atol=1e-5)
        assert answer["bytes_read"] < 0.56 * file_bytes

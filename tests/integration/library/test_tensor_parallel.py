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
from tests.unit.loader.tiny_models import logits, tiny_model, token_ids

PROCESS = Path(__file__).with_name("rank_process.py")


def run_ranks(folders: list[Path], meeting: Path, ranks: int) -> list[list[dict]]:
    """What each rank says of each folder."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, PROCESS, meeting, str(rank), str(ranks), *folders],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    answers = []
    try:
        for process in started:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error[-3000:]
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return answers


def test_two_ranks_compute_what_one_process_does_and_read_half_each(tmp_path) -> None:
    """Sums are made in another order, so logits agree to 1e-5 of their size, and greedy tokens exactly."""
    names = ("llama_tied", "phi3")
    for name in names:
        tiny_model(name).save_pretrained(tmp_path / name / "hf")
        convert(tmp_path / name / "hf", tmp_path / name / "whole")
        convert(tmp_path / name / "hf", tmp_path / name / "cut", tensor_parallel=2)

    answers = run_ranks([tmp_path / name / "cut" for name in names], tmp_path / "meeting", 2)

    for number, name in enumerate(names):
        wanted = stoker.load_model(tmp_path / name / "whole", daemon=None)
        with torch.no_grad():
            tokens = wanted.generate(token_ids(), max_new_tokens=4, do_sample=False)[0].tolist()
        file_bytes = open_checkpoint(tmp_path / name / "whole").weight_bytes
        for answer in (answers[0][number], answers[1][number]):
            assert answer["tokens"] == tokens
            torch.testing.assert_close(torch.tensor(answer["logits"]), logits(wanted), rtol=1e-5, atol=1e-5)
            assert answer["bytes_read"] < 0.56 * file_bytes

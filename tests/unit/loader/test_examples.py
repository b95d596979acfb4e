"""The examples of docs/library.md, run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.unit.loader.test_adapters import lora
from tests.unit.loader.tiny_models import tiny_model

EXAMPLES = Path(__file__).parents[3] / "examples" / "library"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("load_model.py", "LlamaForCausalLM in torch.float32"),
        ("load_tensors.py", "model.layers.0.mlp.down_proj.weight [64, 128] torch.float32"),
        ("open_checkpoint.py", "21 tensors; model.embed_tokens.weight is F32 [96, 64]"),
        ("save_model.py", "21 tensors"),
        ("drop_in.py", "["),
        ("adapters.py", "base ["),
    ],
)
def test_an_example_runs(tmp_path, monkeypatch, capsys, script, says) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    more = {
        "save_model.py": [tmp_path / "new"],
        "adapters.py": [lora(tmp_path / "a"), lora(tmp_path / "b", seed=1)],
    }
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "model"), *map(str, more.get(script, []))])
    monkeypatch.setenv("STOKER_ATTACH_SOCKET", "")

    runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    assert says in capsys.readouterr().out

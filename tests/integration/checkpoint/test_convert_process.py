"""Claims about conversions as real processes: memory, sudden death, full disks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import open_checkpoint
from stoker.checkpoint.verify import verify
from stoker.errors import DiskFull
from stoker.units import MIB
from tests.unit.checkpoint.builders import filled, small_model, write_folder

LARGE_BYTES = 300 * MIB
MEMORY_BOUND_KIB = 64 * 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 300 MB, one tensor of it 200 MB."""
    folder = tmp_path_factory.mktemp("large")
    tensors = {
        "model.embed_tokens.weight": filled("F32", 200 * MIB // 4),
        "model.layers.0.x": filled("BF16", 50 * MIB // 2 - 1),
        "model.layers.1.x": filled("F16", 50 * MIB // 2 - 3),
    }
    yield write_folder(folder / "src", tensors)
    shutil.rmtree(folder)


def run(code: str, *arguments: object) -> str:
    """Run Python code that prints one line; return it."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    ).stdout.strip()


PEAK = """
import resource, sys
from stoker.checkpoint.convert import convert
from stoker.checkpoint.verify import verify
dtype = sys.argv[3] or None
if dtype or sys.argv[4]:
    import stoker.checkpoint.pickle_source, torch
    torch.ones(9 << 20).to(torch.bfloat16)
    torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = sys.argv[4] or sys.argv[1]
index = convert(source, sys.argv[2], dtype=dtype)
assert verify(index.path, threads=2).ok
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["", "float16"])
def test_memory_is_bounded_by_slices_and_not_by_the_model(large: Path, tmp_path: Path, dtype: str) -> None:
    """Peak resident memory grows by less than 64 MiB while 300 MiB are converted and verified."""
    grown_kib = int(run(PEAK, large, tmp_path / "dst", dtype, ""))

    assert grown_kib < MEMORY_BOUND_KIB


def test_memory_is_bounded_for_a_pickle_too(large: Path, tmp_path: Path) -> None:
    """The same for a mapped pickle of 300 MiB, once torch is imported."""
    torch = pytest.importorskip("torch")
    (tmp_path / "src").mkdir()
    shutil.copy(large / "config.json", tmp_path / "src")
    state = {f"model.layers.{number}.x": torch.ones(25 * MIB // 2 * 3) for number in range(2)}
    torch.save(state, tmp_path / "src" / "pytorch_model.bin")

    grown_kib = int(run(PEAK, large, tmp_path / "dst", "", tmp_path / "src"))

    assert (tmp_path / "dst" / "model.safetensors").stat().st_size > LARGE_BYTES
    assert grown_kib < MEMORY_BOUND_KIB


DIE = """
import os, signal, sys
from stoker.checkpoint.convert import convert
def die(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=die)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_the_next_one_cleans_up(
    large: Path, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", DIE, str(large), str(tmp_path / "dst")], check=False)
    left = [entry.name for entry in tmp_path.iterdir()]

    assert killed.returncode == -signal.SIGKILL
    assert len(left) == 1
    assert left[0].startswith("dst.partial-")
    assert not list(tmp_path.glob("*/stoker.json"))
    convert(large, tmp_path / "dst")
    assert [entry.name for entry in tmp_path.iterdir()] == ["dst"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_how_much_is_needed_and_nothing_is_left(tiny_disk: Path, tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"a": filled("U8", 9 * MIB)})

    with pytest.raises(DiskFull, match=r"needs [\d,]+ bytes"):
        convert(src, tiny_disk / "dst")

    assert not list(tiny_disk.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_named_and_nothing_is_left(
    tiny_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space after the check: here, the check is made to see more than there is."""
    src = write_folder(tmp_path / "src", {"a": filled("U8", 9 * MIB)})
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _path: real)

    with pytest.raises(DiskFull, match="No space left") as caught:
        convert(src, tiny_disk / "dst")

    assert caught.value.details["need_bytes"] > 9 * MIB
    assert not list(tiny_disk.iterdir())


LIMITED = """
import resource, sys
from stoker.checkpoint.convert import convert
from stoker.errors import DiskFull
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    convert(sys.argv[1], sys.argv[2])
except DiskFull as error:
    print(error.message)
"""


def test_a_limit_on_file_sizes_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"a": filled("U8", 2 * MIB)})

    message = run(LIMITED, src, tmp_path / "dst")

    assert "the system refused" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def stoker(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the checkpoint commands as their own process."""
    code = (
        "import sys, typer; from stoker.cli import checkpoint; from stoker.errors import StokerError\n"
        "app = typer.Typer(); checkpoint.register(app)\n"
        "try: app()\n"
        "except StokerError as error: sys.exit(error.message)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_convert_inspect_and_verify_speak_json_and_keep_stderr_quiet_without_a_terminal(
    tmp_path: Path,
) -> None:
    src = write_folder(tmp_path / "src", small_model())
    converted = stoker("convert", src, tmp_path / "dst", "-o", "json")
    inspected = stoker("inspect", tmp_path / "dst", "-o", "json", "--tensors")
    verified = stoker("verify", tmp_path / "dst", "-o", "json")

    revision = open_checkpoint(tmp_path / "dst").revision
    assert {json.loads(answer.stdout)["revision"] for answer in (converted, inspected, verified)} == {
        revision
    }
    assert len(json.loads(inspected.stdout)["tensors"]) == len(small_model())
    assert json.loads(verified.stdout)["ok"] is True
    assert [answer.stderr for answer in (converted, inspected, verified)] == ["", "", ""]


def test_verify_exits_1_and_names_the_damage(tmp_path: Path) -> None:
    folder = convert(write_folder(tmp_path / "src", small_model()), tmp_path / "dst").path
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)

    answer = stoker("verify", folder)

    assert answer.returncode == 1
    assert "model.safetensors at byte 0" in answer.stderr
    assert not verify(folder).ok


def test_a_failure_exits_with_its_message(tmp_path: Path) -> None:
    answer = stoker("inspect", tmp_path / "nothing")

    assert answer.returncode == 1
    assert "No checkpoint at" in answer.stderr


def test_the_soft_limit_on_open_files_is_not_reached_by_many_shards(tmp_path: Path) -> None:
    """A checkpoint of more shards than files may be open is converted."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = [{f"model.layers.{number}.x": filled("U8", 3)} for number in range(100)]
    code = (
        "import resource, sys; from stoker.checkpoint.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "print(len(convert(sys.argv[1], sys.argv[2]).tensors))\n"
    )

    assert soft >= 64
    assert run(code, write_folder(tmp_path / "src", *shards), tmp_path / "dst") == "100"

"""A few hundred mutated files at every run; `make fuzz` gives the same readers 100,000."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.folder import read_bounded
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import Target, targets


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_what_is_fuzzed_accepts_its_seeds(target: Target):
    assert all(target.accepts(target.repaired(seed)) for seed in target.seeds)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 2**64))
def test_a_mutated_file_is_refused_or_keeps_every_promise(target: Target, number: int):
    random_ = random.Random(number)
    content = mutated(random_.choice(target.seeds), random_)

    target.accepts(content)
    target.accepts(target.repaired(content))


def test_a_zero_with_a_sign_is_no_offset_as_in_the_library():
    """Found by fuzzing: Python reads `-0` as the integer 0, safetensors' parser as a float."""
    (header, *_) = targets()
    sound = header.seeds[0]

    assert header.accepts(header.repaired(sound))
    assert not header.accepts(header.repaired(sound.replace(b"[0, 64]", b"[-0, 64]")))
    assert b"[0, 64]" in sound


def test_reading_a_small_file_takes_no_memory_for_the_largest_that_may_come(tmp_path):
    import tracemalloc

    path = tmp_path / "stoker.json"
    path.write_bytes(b"{}")
    tracemalloc.start()
    read_bounded(path, limit_bytes=1 << 40)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 1 << 20

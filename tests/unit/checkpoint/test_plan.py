"""Claims about the bytes of a file before they are written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stoker.checkpoint.plan import PlannedTensor, plan_file
from stoker.checkpoint.safetensors_header import LENGTH_BYTES, parse_header


def tensors_of(sizes: list[int]) -> list[PlannedTensor]:
    return [
        PlannedTensor(name=f"t{number}", dtype="U8", shape=(size,), nbytes=size)
        for number, size in enumerate(sizes)
    ]


@given(st.lists(st.integers(0, 2000), max_size=30))
def test_every_plan_is_aligned_without_holes_and_keeps_the_order(sizes: list[int]) -> None:
    plan = plan_file(tensors_of(sizes))

    header = parse_header(plan.header[LENGTH_BYTES:], file_bytes=plan.size_bytes, where="plan")
    real = [entry for entry in plan.entries if not entry.is_filler]
    assert len(plan.header) % 4096 == 0
    assert all(entry.offset % 256 == 0 for entry in real)
    assert [entry.tensor.name for entry in real] == [f"t{number}" for number in range(len(sizes))]
    assert [(entry.tensor.name, entry.offset) for entry in plan.entries if entry.tensor.nbytes] == [
        (tensor.name, header.data_start + tensor.begin) for tensor in header.tensors if tensor.nbytes
    ]


def test_tensors_that_end_on_the_boundary_need_no_filler() -> None:
    plan = plan_file(tensors_of([256, 512, 0, 256, 100]))

    assert not any(entry.is_filler for entry in plan.entries)


def test_filler_is_shorter_than_the_boundary_and_never_last() -> None:
    plan = plan_file(tensors_of([1, 255, 257]))

    assert [entry.tensor.nbytes for entry in plan.entries if entry.is_filler] == [255, 1]
    assert not plan.entries[-1].is_filler


def test_a_model_without_tensors_has_a_file_of_one_header() -> None:
    assert plan_file([]).size_bytes == 4096

from __future__ import annotations

from services.worker.weights.arrival_order import arrival_order
from stoker.attach import Tensor


def tensor(name: str, *, layer: int | None = None, file: int = 0, at: int = 0, nbytes: int = 10) -> Tensor:
    return Tensor(name=name, dtype="U8", shape=(nbytes,), file=file, offset=at, nbytes=nbytes, layer=layer)


def test_stages_are_what_feeds_the_model_its_layers_and_the_rest() -> None:
    order = arrival_order(
        [
            tensor("embed", at=0),
            tensor("l0.a", layer=0, at=10),
            tensor("l0.b", layer=0, at=20),
            tensor("l1.a", layer=1, at=30),
            tensor("norm", at=40),
            tensor("head", at=50),
        ],
        files=1,
    )

    assert order.stage_of == {"embed": 0, "l0.a": 1, "l0.b": 1, "l1.a": 2, "norm": 3, "head": 3}
    assert order.needs_bytes == ((10,), (30,), (40,), (60,))


def test_a_stage_needs_all_that_comes_before_it_wherever_it_lies() -> None:
    order = arrival_order(
        [tensor("embed", file=1, at=90), tensor("l0", layer=0, file=0, at=50), tensor("norm", file=1, at=0)],
        files=2,
    )

    assert order.needs_bytes == ((0, 100), (60, 100), (60, 100))


def test_a_checkpoint_without_tensors_has_no_stages() -> None:
    assert arrival_order([], files=1).stages == 0

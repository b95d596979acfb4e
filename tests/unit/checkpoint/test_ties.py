"""Claims about which tensors need not be stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stoker.checkpoint.plan import PlannedTensor
from stoker.checkpoint.ties import tied_groups

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decide(
    *,
    says: bool | None,
    default: bool = False,
    same: bool = True,
    head_shape: tuple[int, ...] = (4, 2),
    default_ties: Callable[[], bool] | None = None,
) -> tuple[tuple[str, ...], ...]:
    tensors = {
        name: PlannedTensor(name=name, dtype="F32", shape=shape, nbytes=4 * shape[0] * shape[1])
        for name, shape in ((EMBEDDING, (4, 2)), (HEAD, head_shape))
    }
    return tied_groups(
        tensors,
        ties_embeddings=says,
        default_ties=default_ties or (lambda: default),
        same_bytes=lambda _one, _other: same,
    )


def test_a_head_that_the_config_ties_is_stored_once() -> None:
    assert decide(says=True) == ((EMBEDDING, HEAD),)


def test_a_silent_config_leaves_it_to_the_architecture() -> None:
    assert decide(says=None, default=True) == ((EMBEDDING, HEAD),)
    assert decide(says=None, default=False) == ()


def test_equal_bytes_are_no_tie_when_the_config_says_so() -> None:
    assert decide(says=False, default=True) == ()


def test_a_head_that_differs_is_stored_whatever_the_config_says() -> None:
    assert decide(says=True, same=False) == ()
    assert decide(says=True, head_shape=(2, 4)) == ()


def test_the_architecture_is_asked_only_when_it_matters() -> None:
    def asked() -> bool:
        pytest.fail("asked without need")

    assert decide(says=None, same=False, default_ties=asked) == ()
    assert decide(says=True, default_ties=asked) == ((EMBEDDING, HEAD),)

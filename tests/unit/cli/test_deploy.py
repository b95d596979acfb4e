"""What `stoker deploy` makes of the names that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.cli.models import checkpoint_uri
from stoker.errors import NotFound


def test_a_folder_is_made_absolute_and_a_uri_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert checkpoint_uri("owner/name") == str(tmp_path / "owner" / "name")
    assert checkpoint_uri("hf://owner/name") == "hf://owner/name"
    assert checkpoint_uri("/elsewhere/than/here") == "/elsewhere/than/here"


def test_a_name_of_the_hub_without_its_scheme_is_told_how_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(NotFound, match="hf://HuggingFaceTB/SmolLM2-135M"):
        checkpoint_uri("HuggingFaceTB/SmolLM2-135M")

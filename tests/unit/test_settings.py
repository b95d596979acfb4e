"""Settings: environment over file over defaults; unknown keys refused with a near name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import SettingsConfigDict

from stoker.errors import ConfigError
from stoker.settings import ServiceSettings, load_settings


class Kettle(ServiceSettings):
    """Settings of a service that exists only here."""

    model_config = SettingsConfigDict(env_prefix="STOKER_KETTLE_")

    water_litres: float = 1.0
    """Capacity, in litres."""


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text('water_litres = 2.0\nlog_level = "DEBUG"\n')
    monkeypatch.setenv("STOKER_KETTLE_WATER_LITRES", "3.0")

    settings = load_settings(Kettle, toml=file)

    assert (settings.water_litres, settings.log_level) == (3.0, "DEBUG")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("water_litres = 2.0\n")
    monkeypatch.setenv("STOKER_KETTLE_CONFIG", str(file))

    assert load_settings(Kettle).water_litres == 2.0


def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_KETTLE_WATER_LITERS", "3.0")

    with pytest.raises(ConfigError, match=r"STOKER_KETTLE_WATER_LITERS; did you mean 'water_litres'"):
        load_settings(Kettle)


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("watr_litres = 2.0\n")

    with pytest.raises(ConfigError, match=r"unknown key 'watr_litres'; did you mean 'water_litres'"):
        load_settings(Kettle, toml=file)


def test_a_wrong_value_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_KETTLE_WATER_LITRES", "a lot")

    with pytest.raises(ConfigError, match=r"Kettle\.water_litres: .*'a lot'"):
        load_settings(Kettle)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings file .*nowhere\.toml"):
        load_settings(Kettle, toml=tmp_path / "nowhere.toml")


def test_a_file_that_is_not_toml_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("water_litres: 2")

    with pytest.raises(ConfigError, match=r"kettle\.toml is not TOML"):
        load_settings(Kettle, toml=file)

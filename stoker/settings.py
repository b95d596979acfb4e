"""Settings: `STOKER_<NAME>_*` environment variables over a TOML file over defaults; unknown keys refused."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from stoker.errors import ConfigError


class ServiceSettings(BaseSettings):
    """Base of every service's settings: frozen, each field documented with its unit."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    log_level: str = "INFO"
    """Lowest level logged: DEBUG, INFO, WARNING or ERROR."""

    metrics_port: int = 0
    """TCP port of the Prometheus endpoint `/metrics`; 0 = none."""

    drain_seconds: float = 20.0
    """How long running work may take to end after SIGTERM, in seconds."""

    parent_pid: int = 0
    """When not 0: end with this process. Set by `stoker up`, so that nothing outlives it."""


S = TypeVar("S", bound=ServiceSettings)


def load_settings(cls: type[S], *, toml: Path | None = None, **overrides: Any) -> S:
    """Read a service's settings.

    Args:
        cls: The settings class; its `env_prefix` names the variables.
        toml: A TOML file with the same keys; default: the one that `<env_prefix>CONFIG` names, if any.
        **overrides: Values that win over everything else.

    Raises:
        ConfigError: An unknown key or a value out of range; says which, and the nearest known name.
    """
    prefix = cls.model_config.get("env_prefix", "")
    config_variable = f"{prefix}CONFIG"
    if toml is None and os.environ.get(config_variable):
        toml = Path(os.environ[config_variable])
    from_file = _read_toml(toml) if toml is not None else {}
    known = set(cls.model_fields)
    for name in from_file:
        _refuse_unknown(name, known, f"{toml}: unknown key {name!r}")
    for variable in os.environ:
        if variable.startswith(prefix) and variable != config_variable:
            name = variable.removeprefix(prefix).lower()
            _refuse_unknown(name, known, f"unknown environment variable {variable}")
    in_environment = {name for name in known if f"{prefix}{name.upper()}" in os.environ}
    values = {name: value for name, value in from_file.items() if name not in in_environment} | overrides
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{cls.__name__}.{where}: {first['msg']} (got {first.get('input')!r})") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _refuse_unknown(name: str, known: set[str], message: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
    raise ConfigError(message + hint)

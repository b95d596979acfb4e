"""Logs: structlog, one JSON object per line on stderr, or coloured text where a person watches.

The event is a constant `noun.verb_past` (`replica.loaded`); data stands in keys, with units in their names;
ids are bound by contextvars (`bind`), so that every line of a request carries its request id.
"""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog
from structlog.contextvars import bound_contextvars as bind

from stoker.errors import ConfigError

__all__ = ["bind", "configure", "get"]


def configure(service: str, *, level: str = "INFO", json: bool | None = None) -> None:
    """Set up logging for this process; call once, first thing.

    Args:
        service: Name put into every line, e.g. `node_agent`.
        level: Lowest level shown, a standard name.
        json: True = JSON, False = text, None = text only on a terminal.

    Raises:
        ConfigError: Nobody knows this level; lines are shown from INFO on, so that this can be logged.
    """
    levels = logging.getLevelNamesMapping()
    as_json = not sys.stderr.isatty() if json is None else json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _named(service),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(sort_keys=False)]
        if as_json
        else [structlog.dev.ConsoleRenderer()]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(levels.get(level.upper(), logging.INFO)),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        foreign_pre_chain=shared,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries speak up only when something is wrong
    if level.upper() not in levels:
        raise ConfigError(f"nobody knows the log level {level!r}: set DEBUG, INFO, WARNING or ERROR")


def get() -> structlog.typing.FilteringBoundLogger:
    """Return this process's logger."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger())


def _named(service: str) -> structlog.typing.Processor:
    """Return what puts the service's name into every line, also in threads that no context reached."""

    def name(
        _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    return name

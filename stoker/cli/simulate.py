"""`stoker simulate`: placement policies side by side on a simulated cluster."""

from __future__ import annotations

import os
import sys

import typer

PROGRAM = "services.controller.simulation"


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    # The simulator runs the controller's own modules, which the library must not import: another process.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(context_settings=settings)(simulate)


def simulate(context: typer.Context) -> None:
    """Compare placement policies on a simulated cluster; `stoker simulate --help` lists the options."""
    arguments = [sys.executable, "-m", PROGRAM, *context.args]
    os.execv(sys.executable, arguments)  # noqa: S606 - our own program, arguments as a list

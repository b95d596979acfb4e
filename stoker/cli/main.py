"""The `stoker` command: assembles its subcommands and turns errors into messages and exit codes."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

import stoker
from stoker.cli import cache, chat, checkpoint, cluster, doctor, models, operate, push, simulate, up
from stoker.cli.output import Format, FormatOption, console, errors, print_json
from stoker.errors import StokerError
from stoker.rpc import UNREACHABLE

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="stoker",
    help="Serve many large language models from few GPUs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

for part in (up, models, cluster, chat, checkpoint, cache, push, doctor, simulate, operate):
    part.register(app)


@app.command()
def version(output: FormatOption = Format.text) -> None:
    """Print the version."""
    if output is Format.json:
        print_json({"version": stoker.__version__})
    else:
        console.print(f"stoker {stoker.__version__}", highlight=False)


def run() -> NoReturn:
    """Run the command and exit: 0 done, 1 failed (the reason on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except StokerError as error:
        errors.print(f"[bold red]error:[/] {_escaped(error.message)}", highlight=False)
        if UNREACHABLE in error.details:
            errors.print("is it running? `stoker up` starts everything on this host", style="dim")
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    run()

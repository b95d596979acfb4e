"""`python -m services.controller.simulation`, which `stoker simulate` runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from services.controller.simulation import plot, report, scenario, traces, workload
from services.controller.simulation.world import World
from stoker.errors import InvalidRequest, StokerError
from stoker.ids import ModelName

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Hardware(StrEnum):
    """Keys of `scenario.HARDWARE`."""

    PAPER = "paper"
    H100 = "h100"


@app.command(name="simulate")
def simulate(  # noqa: PLR0913, PLR0917 - a command's options are its parameters
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV: arrival_s, input_tokens, output_tokens and, optionally, model (.gz too)"),
    ] = None,
    invocations: Annotated[
        Path | None, typer.Option(help="CSV of Azure Functions 2019: func, m1, m2, ... (.gz too)")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="CSV to draw lengths from: input_tokens, output_tokens (.gz too)")
    ] = None,
    models: Annotated[str, typer.Option(help="SIZE:COUNT, comma separated")] = "opt-6.7b:32",
    nodes: Annotated[int, typer.Option(min=1, max=100_000)] = 4,
    hardware: Annotated[Hardware, typer.Option(help="kind of host")] = Hardware.PAPER,
    devices: Annotated[int, typer.Option(min=0, help="per host; 0 = what the hardware has")] = 0,
    rate: Annotated[float, typer.Option(min=0.001, help="requests per second, without a trace")] = 0.8,
    cv: Annotated[float, typer.Option(min=0.1, help="of inter-arrival times, without a trace")] = 8.0,
    seconds: Annotated[float, typer.Option(min=1, help="length of the trace")] = 3600.0,
    context: Annotated[int, typer.Option(min=16, help="longest prompt and answer, tokens")] = 2048,
    policy: Annotated[list[str] | None, typer.Option(help="may be given several times; default: all")] = None,
    failures: Annotated[float, typer.Option(min=0, help="host failures per hour")] = 0.0,
    standing: Annotated[
        float, typer.Option(min=0, help="seconds that the cluster stands before the trace begins")
    ] = 0.0,
    timeout: Annotated[float, typer.Option(min=1, help="a request that waits longer is lost")] = 300.0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same run")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a picture here")] = None,
) -> None:
    """Run placement policies side by side on a simulated cluster, over real or generated traces."""
    _check_outputs(json_file, plot_file)
    served = scenario.parse_models(models)
    names = [model.name for model in served]
    chosen = _known(policy or list(scenario.POLICIES))
    if trace is not None and invocations is not None:
        raise InvalidRequest("--trace and --invocations are two traces: give one of them")
    requests = (
        _generated(names, lengths, invocations, rate=rate, cv=cv, seconds=seconds, context=context, seed=seed)
        if trace is None
        else traces.read_requests(trace, names)
    )
    spec = scenario.host(scenario.HARDWARE[hardware], devices=devices)
    waits: dict[str, list[float]] = {}

    def keep(world: World) -> None:
        waits[world.policy.name] = [session.wait_seconds for session in world.sessions]

    realised_rate, realised_cv = workload.realised(requests)
    typer.echo(
        f"{len(requests)} requests at {realised_rate:.2f}/s, CV {realised_cv:.1f}; {len(served)} models on "
        f"{nodes} x {spec.device_count} {spec.device.kind}; seed {seed}"
    )
    summaries = scenario.simulate(
        chosen,
        [spec] * nodes,
        served,
        requests,
        seed=seed,
        timeout_seconds=timeout,
        failures=scenario.Failures(per_hour=failures, seed=seed) if failures else None,
        standing_seconds=standing,
        then=keep,
    )
    typer.echo(report.table(summaries))
    if json_file is not None:
        _write(json_file, report.to_json(summaries) + "\n")
    if plot_file is not None:
        plot.draw(waits, plot_file)


def _check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse files that could not be written, before anything is simulated for them."""
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidRequest(f"{option} {path}: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise InvalidRequest(f"{option} {path}: this is a folder, name a file in it")
    if plot_file is not None:
        plot.check(plot_file)


def _known(policies: list[str]) -> list[str]:
    for name in policies:
        if name not in scenario.POLICIES:
            raise InvalidRequest(f"--policy {name!r} is none of {', '.join(scenario.POLICIES)}")
    return list(dict.fromkeys(policies))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InvalidRequest(f"--json {path}: {error.strerror or error}") from error


def _generated(  # noqa: PLR0913 - what a generated trace is made of
    names: Sequence[ModelName],
    lengths: Path | None,
    invocations: Path | None,
    *,
    rate: float,
    cv: float,
    seconds: float,
    context: int,
    seed: int,
) -> list[workload.Request]:
    """Return requests at the moments of an invocations file, or else of a Gamma process."""
    drawn = workload.Lengths.constant(64, 96)
    if lengths is not None:
        drawn = traces.read_lengths(lengths, context_tokens=context)
    if invocations is None:
        found = workload.gamma_requests(
            names, requests_per_second=rate, seconds=seconds, cv=cv, lengths=drawn, seed=seed
        )
    else:
        minutes = range(1, 1 + max(1, round(seconds / 60)))
        found = traces.read_invocations(
            invocations, names, drawn, minutes=minutes, requests_per_second=rate, seed=seed
        )
    if not found:
        raise InvalidRequest(f"{rate:g} requests/s for {seconds:g} s are no request: raise one of them")
    return found


if __name__ == "__main__":
    try:
        app(prog_name="stoker simulate")
    except StokerError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(1)

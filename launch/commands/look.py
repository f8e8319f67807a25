"""`globallocal runs | report`: what run folders tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(runs)
    app.command()(report)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or a run's own folder.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how every run stands: state, step, loss, speed, time left, last restart.

    A run is running, preempted (asked to stop; the same command goes on), hung, failed or done. Only the run folders
    are read: nothing is asked of MLflow or of another host.

    Examples:

        globallocal runs

        globallocal runs /shared/runs --json
    """
    from rich.console import Console

    from launch.report import overview

    rows = overview.look(folder)
    if as_json:
        typer.echo(overview.to_json(rows))
    else:
        overview.show(rows, folder, Console())


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write a page that tells what became of a run: one HTML file without a server, under way or after.

    Curves, speed, memory, routers, health, samples, checkpoints, settings and environment, from the run folder alone;
    of several runs also where their settings differ. What a folder does not tell is said on the page.

    Examples:

        globallocal report runs/quickstart --output quickstart.html

        globallocal report runs/small runs/base --output compared.html
    """
    from data_prep.errors import UserError
    from data_prep.store import explained_write_errors, publish_file
    from launch.report.page import page
    from launch.report.read import is_run, read_run

    problems = [
        f"{folder}: holds no run; globallocal runs FOLDER lists them" for folder in folders if not is_run(folder)
    ]
    if problems:
        raise UserError(problems)
    found = [read_run(folder) for folder in folders]
    with explained_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        publish_file(output, page(found).encode())
    typer.echo(f"{output}: {output.stat().st_size / 1e6:,.1f} MB; open it in any browser")
    for run in found:
        for line in run.missing:
            typer.echo(f"{run.folder}: {line}", err=True)

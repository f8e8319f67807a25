"""`globallocal config show | diff | schema`: the settings of run files and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunOrFile = Annotated[Path, typer.Argument(help="A run file, the name of a shipped one, or a run folder.")]


def register(app: typer.Typer) -> None:
    config = typer.Typer(no_args_is_help=True, help="Show and compare the settings of run files and runs.")
    config.command()(show)
    config.command()(diff)
    config.command()(schema)
    app.add_typer(config, name="config")


def show(
    run: RunOrFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings that replace those of the file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting of a run, and where its value comes from: default, preset, file and line, command line.

    What is printed is a run file itself. The model's derived sizes are in it; what the dataset fixes (vocabulary,
    special ids) is not. Nothing is started or opened: the dataset need not be there.

    Examples:

        globallocal config show launch/runs/quickstart.yaml training.max_steps=500

        globallocal config show runs/quickstart --json
    """
    import json
    from dataclasses import asdict

    from launch.settings.origins import settings_of, to_yaml

    found = settings_of(run, overrides or [])
    if as_json:
        typer.echo(json.dumps({key: asdict(setting) for key, setting in found.items()}, indent=2))
    else:
        typer.echo(to_yaml(found))


def diff(
    one: RunOrFile,
    other: RunOrFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where two run files or runs differ, the settings of the model included.

    Exit codes: 0 they are the same, 1 they differ, 2 something to fix.

    Examples:

        globallocal config diff launch/runs/wikitext103-small.yaml launch/runs/wikitext103-base.yaml

        globallocal config diff runs/a runs/b
    """
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from launch.settings.origins import differences, flow, settings_of

    found = differences(settings_of(one), settings_of(other))
    if as_json:
        typer.echo(json.dumps({key: {"one": a, "other": b} for key, (a, b) in found.items()}, indent=2))
    elif found:
        table = Table("setting", escape(str(one)), escape(str(other)))
        for key, values in found.items():
            table.add_row(key, *(escape(flow(value)) for value in values))
        Console().print(table)
    else:
        typer.echo(f"{one} and {other}: the same settings")
    raise typer.Exit(1 if found else 0)


def schema() -> None:
    """Print the JSON schema of run files, from which editors complete.

    It is shipped as launch/runs/schema.json. A run file names it in its first line, with its path or URL:
    `# yaml-language-server: $schema=schema.json`.

    Example:

        globallocal config schema > schema.json
    """
    import json

    from launch.settings.schema import run_schema

    typer.echo(json.dumps(run_schema(), indent=2, ensure_ascii=False))

"""`globallocal estimate | doctor | train | launch`: what runs before and around a training job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ConfigOption = Annotated[Path, typer.Option(help="Run file, such as launch/runs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Settings that replace those of the run file."),
]


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    config: ConfigOption,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks; one a device when absent, 2 where there are only CPU cores."),
    ] = None,
) -> None:
    """Train on all devices of this machine; start it again to go on where it stopped.

    It runs `deepspeed pipeline/train.py`. Ctrl-C or SIGTERM saves a checkpoint and stops (exit code 75); a second
    one kills. Exit codes: 0 done, 2 something to fix, 75 stopped with all saved, else a rank failed.

    Examples:

        globallocal train --config launch/runs/quickstart.yaml

        globallocal train --config launch/runs/quickstart.yaml training.max_steps=500 run.name=longer
    """
    from launch.processes import run_session
    from launch.submit import environment_for, local_job

    settings = checked_config(config, overrides)
    job = local_job(config, overrides or [], processes)
    ended = run_session(job.command, environment_for(job), launch_log(settings))
    raise typer.Exit(ended.code)


def checked_config(config: Path, overrides: list[str] | None) -> RunConfig:
    """The run's settings; what is wrong with them is said here, before any rank has started."""
    from pipeline.config import load_config

    return load_config(config, overrides or [])


def launch_log(settings: RunConfig) -> Path:
    """The file that keeps everything the launcher and the ranks print."""
    folder = settings.run_folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "launch.log"

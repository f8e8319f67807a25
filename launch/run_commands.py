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
    app.command()(estimate)
    app.command()(train)


def estimate(
    config: Annotated[Path | None, typer.Option(help="Run file.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Or a model preset: quickstart, seed, small, base, large, xl.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices, over all nodes.")] = 1,
    teraflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Peak rate of one device in 10^12 operations a second: H100 bf16 989, A100 312."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Part of the peak rate that training reaches (MFU).")
    ] = 0.4,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one device, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run needs before it is paid for: parameters, memory a rank, time, price.

    Memory is given for every ZeRO stage; the arrow marks the run's own. Activations are those of the micro-batch,
    found by running the model on a device without memory. Nothing is downloaded, started or written.

    Examples:

        globallocal estimate --preset base --ranks 8 --teraflops 989 --price-per-hour 2.5

        globallocal estimate --config launch/runs/wikitext103-small.yaml --teraflops 312 training.micro_batch_size=32
    """
    from rich.console import Console

    from data_prep.errors import UserError
    from launch import estimate as room

    if (config is None) == (preset is None):
        raise UserError("give --config RUN.yaml or --preset NAME")
    machine = room.Machine(ranks, teraflops, utilisation, price_per_hour)
    if config is not None:
        settings = checked_config(config, overrides)
    else:
        settings = room.preset_config(str(preset), overrides or [])
    result = room.estimate(settings, machine)
    if as_json:
        typer.echo(result.to_json())
    else:
        room.show(result, machine, Console())


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

"""`globallocal estimate | rehearse | doctor | train | launch`: what runs before and around a training job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.options import grouped, option
from launch.jobs.options import Allocation, HostChoice, Reach

if TYPE_CHECKING:
    from pipeline.config import Reading, RunConfig

ConfigOption = Annotated[Path, typer.Option(help="Run file, or the name of one that is shipped: quickstart.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Settings that replace those of the run file."),
]


def register(app: typer.Typer) -> None:
    app.command()(estimate)
    app.command()(rehearse)
    app.command()(doctor)
    app.command()(train)
    app.command()(launch)


def estimate(
    config: Annotated[Path | None, typer.Option(help="Run file, or the name of a shipped one.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Or a model preset: quickstart, seed, small, base, large, xl.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices, over all nodes.")] = 1,
    card: Annotated[str | None, typer.Option(help="Kind of device, such as H100, A100 or 'RTX 4090'.")] = None,
    teraflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Its peak rate in 10^12 operations per second; the data sheet's when absent."),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1, help="Part of the peak rate that training reaches (MFU); what was measured when absent."
        ),
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one device, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run needs before it is paid for: parameters, memory per rank, time, price.

    Memory is given for every ZeRO stage; the arrow marks the run's own. Activations are those of the micro-batch,
    found by running the model on a device without memory. Time follows from what was measured for the preset and the
    card, and is called a guess where nothing was. Nothing is downloaded, started or written.

    Examples:

        globallocal estimate --preset base --ranks 8 --card H100 --price-per-hour 2.5

        globallocal estimate --config launch/runs/wikitext103-small.yaml --card A100 training.micro_batch_size=32
    """
    from rich.console import Console

    from data_prep.errors import UserError
    from launch.jobs.local import choose_accelerator

    choose_accelerator()
    from launch.preflight import estimate as room  # imports DeepSpeed, which looks for an accelerator

    if (config is None) == (preset is None):
        raise UserError("give --config RUN.yaml or --preset NAME")
    machine = room.Machine(ranks, card, teraflops, utilisation, price_per_hour)
    if config is not None:
        settings = checked_config(config, overrides)
    else:
        settings = room.preset_config(str(preset), overrides or [])
    result = room.estimate(settings, machine)
    if as_json:
        typer.echo(result.to_json())
    else:
        room.show(result, Console())


def rehearse(
    config: ConfigOption,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices, over all nodes.")] = 1024,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    device_memory_gib: Annotated[float, typer.Option(min=0.1, help="Memory of one device.")] = 80.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps whose data every rank's loader goes through.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Go through a job of any size on this machine: every rank's settings, place, data and memory; nothing is started.

    All that does not fit together is said at once: the batch, DeepSpeed's reading of the settings on each rank, hpZ
    groups against nodes, memory. Then each rank's loader runs over the steps, and every global batch must be shared out
    exactly.

    Example:

        globallocal rehearse --config launch/runs/wikitext103-base.yaml --ranks 1024 training.global_batch_size=8192
    """
    from launch.jobs.local import choose_accelerator

    choose_accelerator()
    from launch.preflight import rehearse as room  # imports DeepSpeed, which looks for an accelerator

    fleet = room.Fleet(ranks, gpus_per_node, device_memory_gib)
    result = room.rehearse(checked_config(config, overrides), fleet, steps, lambda line: typer.echo(line, err=True))
    typer.echo(result.to_json() if as_json else "\n".join(result.lines()))


def doctor(
    config: Annotated[Path | None, typer.Option(help="Run file; without one only this machine is looked at.")] = None,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; as `train` chooses when absent.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Look at the hosts of this file too, over ssh.")] = None,
    ssh: Annotated[str, typer.Option(help="hostfile: options for ssh, such as '-p 2222 -i ~/.ssh/cluster'.")] = "",
    local: Annotated[bool, typer.Option("--local", help="This machine and nothing else.")] = False,
    skip_step: Annotated[bool, typer.Option("--skip-step", help="Take no real step (it needs a minute).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find every problem of a run before it starts, each with its remedy.

    Versions, devices, compiled operators; settings, batch, dataset, vocabulary, DeepSpeed JSON; memory, disk, MLflow;
    one real step. With --hostfile also the hosts: ssh there and back, the same code and versions, clocks, a folder
    that is truly shared, bandwidth between them. Exit codes: 0 all is well, 1 warnings, 2 problems.

    Examples:

        globallocal doctor --local

        globallocal doctor --config launch/runs/wikitext103-base.yaml --hostfile hosts

        globallocal doctor --config launch/runs/quickstart.yaml

        globallocal doctor --config launch/runs/wikitext103-small.yaml --processes 8 --json
    """
    from rich.console import Console

    from data_prep.errors import UserError
    from launch.jobs.local import choose_accelerator, default_ranks

    choose_accelerator()
    from launch.preflight import doctor as room  # imports DeepSpeed, which looks for an accelerator
    from launch.preflight.hosts import host_findings

    if config is None and overrides:
        raise UserError(f"{' '.join(overrides)}: overrides need --config")
    if local and (config or hostfile):
        raise UserError("--local looks at this machine alone; leave out --config and --hostfile")
    findings = list(room.local_findings())
    if hostfile is not None:
        findings += host_findings(hostfile, ssh, room.run_folder(config, overrides or []))
    if config is not None:
        ranks = processes or (room.slots(hostfile) if hostfile else 0) or default_ranks()
        findings += room.run_findings(config, overrides or [], ranks)
        if not skip_step and room.exit_code(findings) < 2:
            findings.append(room.step(config, overrides or [], processes))
    if as_json:
        typer.echo(room.to_json(findings))
    else:
        room.show(findings, Console())
    raise typer.Exit(room.exit_code(findings))


def train(
    config: ConfigOption,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks; one per device when absent, 2 where there are only CPU cores."),
    ] = None,
) -> None:
    """Train on all devices of this machine; start it again to go on where it stopped.

    It runs `deepspeed pipeline/train.py`. Ctrl-C or SIGTERM saves a checkpoint and stops (exit code 75); a second
    one kills. Exit codes: 0 done, 2 something to fix, 75 stopped with all saved, else a rank failed.

    Examples:

        globallocal train --config launch/runs/quickstart.yaml

        globallocal train --config launch/runs/quickstart.yaml training.max_steps=500 run.name=longer
    """
    from launch.jobs.local import LocalRun, run

    read = reading(config, overrides)
    job = LocalRun(config, tuple(overrides or ()), read.config, processes)
    check_fit(read, job.ranks)
    raise typer.Exit(run(job, max_restarts=0))


HOST_OPTIONS = {
    "include": option("hostfile: only these hosts, joined by commas."),
    "exclude": option("hostfile: all but these hosts."),
    "min_nodes": option("hostfile: go on with so few hosts when others are gone; all when absent.", min=1),
}
REACH_OPTIONS = {
    "ssh": option("hostfile: options for ssh, such as '-p 2222 -i ~/.ssh/cluster'."),
    "master_addr": option("hostfile, slurm: address of the first host; asked of it when absent."),
    "master_port": option(
        "Port of the first host, 29500 when absent; local: a free one when absent.", min=1, max=65535
    ),
    "interface": option("hostfile, slurm: network interface; found on each node when absent."),
    "env": option("hostfile, slurm: variable of this shell to hand to every rank, by name."),
}
SLURM_OPTIONS = {
    "nodes": option("slurm: nodes, a number or MIN-MAX."),
    "ranks_per_node": option("slurm: ranks of each node, one per device.", min=1),
    "time": option("slurm: time limit of one start, such as 24:00:00."),
    "partition": option("slurm: partition."),
    "turns": option("slurm: so many jobs in turn, for queues that forbid requeue; 0: requeue.", min=0),
    "sbatch": option("slurm: any option of sbatch, such as --sbatch=--gpus-per-node=8."),
}


@grouped(hosts=HOST_OPTIONS, reach=REACH_OPTIONS, allocation=SLURM_OPTIONS)
def launch(
    config: ConfigOption,
    hosts: HostChoice,
    reach: Reach,
    allocation: Allocation,
    overrides: Overrides = None,
    local: Annotated[int | None, typer.Option(min=1, help="On this machine, so many ranks.")] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="On the hosts of this file (HOST slots=N per line), over pdsh and ssh.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a job of Slurm; returns when it is queued.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="slurm: print the log until the job has ended.")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts after failures, from the newest checkpoint.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, contact no host.")] = False,
) -> None:
    """Run a training job here, over a hostfile or on Slurm, and start it again when it fails.

    DeepSpeed's launcher starts the ranks, on Slurm srun does. What every rank must get goes through a file that only
    you can read, in the run folder, which all nodes share: NCCL_*, GLOO_*, MLFLOW_*, HF_*, AWS_*, TORCH_* of this
    shell, and --env.

    Examples:

        globallocal launch --config launch/runs/wikitext103-small.yaml --local 8

        globallocal launch --config launch/runs/wikitext103-base.yaml --hostfile hosts --min-nodes 2 --env WANDB_MODE

        globallocal launch --config launch/runs/wikitext103-base.yaml --slurm --nodes 4 --ranks-per-node 8 \\
        --time 24:00:00 --sbatch=--gpus-per-node=8 --dry-run
    """
    from data_prep.errors import UserError
    from launch.jobs.environment import ClusterJob
    from launch.jobs.local import LocalRun, Run, run
    from launch.jobs.over_hosts import HostfileRun
    from launch.jobs.slurm import SlurmRun

    if sum((local is not None, hostfile is not None, slurm)) != 1:
        raise UserError("give one of --local N, --hostfile FILE and --slurm")
    read, given = reading(config, overrides), tuple(overrides or ())
    if not dry_run:
        check_fit(read, local)
    settings = read.whole()
    cluster = ClusterJob.new(config, given, settings.run_folder, reach)
    if slurm:
        queued = SlurmRun(settings, cluster, allocation, max_restarts, reach.master_addr)
        if dry_run:
            typer.echo(queued.describe())
            return
        raise typer.Exit(queued.submit(wait))
    job: Run
    if hostfile is not None:
        job = HostfileRun.of_hostfile(settings, cluster, hostfile, hosts, reach, keep_standby=max_restarts > 0)
    else:
        job = LocalRun(config, given, settings, local, reach.master_port, keep_standby=max_restarts > 0)
    if dry_run:
        typer.echo(job.describe())
        return
    raise typer.Exit(run(job, max_restarts))


def reading(config: Path, overrides: list[str] | None) -> Reading:
    """The run's settings, and what is wrong with them."""
    from pipeline.config import read_config

    return read_config(config, overrides or [])


def checked_config(config: Path, overrides: list[str] | None) -> RunConfig:
    return reading(config, overrides).whole()


def check_fit(read: Reading, ranks: int | None) -> None:
    """Settings by themselves, against each other, the dataset, the DeepSpeed JSON and this machine: all in one round.

    No rank has started then. What a rank will need of its device, and for how long, is said.

    Args:
        ranks: None for a job on other hosts: what they have is for them to say.
    """
    from launch.jobs.local import choose_accelerator, device_problems, local_devices

    choose_accelerator()
    import torch

    from launch.preflight.forecast import forecast
    from pipeline.fitting import fit, local_precision

    device = torch.device("cuda" if local_devices() and torch.cuda.is_available() else "cpu")
    wrong = [*read.problems, *(device_problems(ranks) if ranks else ())]
    fitted = fit(read.config, ranks, None, device, wrong=wrong, disk=True)
    precision = local_precision(read.config, device)
    for line in forecast(read.config, fitted, ranks, precision, device) if ranks else ():
        typer.echo(line)

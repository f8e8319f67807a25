"""Real ranks for the tests: `run_ranks` starts them, `python -m tests.pipeline.ranks PLAN` is one of them.

A plan is several runs of the same processes, so that a test pays once for importing torch and DeepSpeed.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.forks import Fork, start
from tests.pipeline.moments import Moment, happening
from tests.pipeline.poison import Poison, poisoned
from tests.pipeline.tracking_fixtures import empty_store

TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.pool_size=64",
    "model.pool_dim=32",
    "model.router_hidden_size=32",
    "model.dropout=0.1",
    # Runs that add in another order are compared step by step, and a router that chooses another row for a rounding
    # error parts them: this beginning amplifies rounding less than the default one.
    "model.initializer_range=0.02",
    "model.summary_heads=8",
    "model.block_router=true",  # every part of the model
    "model.branch_gain=1",
    "data.sequence_length=32",
    "optimizer.learning_rate=3.0e-3",
    "optimizer.warmup_steps=2",
    "training.max_steps=6",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.precision=fp32",
    "training.log_interval_steps=1",
    "checkpoint.interval_steps=3",
    "evaluation.interval_steps=3",
    "evaluation.max_samples=5",
    "evaluation.prompts=[]",
]


@dataclass
class Run:
    """One training run: overrides of launch/runs/quickstart.yaml, and checkpoints to begin with."""

    name: str
    overrides: list[str] = field(default_factory=list)
    copy_checkpoint: str | None = None
    """Another run's checkpoint, `run/step-XXXXXXXX`, put into this run's folder first."""
    moment: Moment | None = None
    """Something happens to one rank."""
    poison: Poison | None = None
    """Some of the data is bad."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Global batches [first, last) that the run leaves out from its start, as if decided before."""


def tiny_overrides(run: Run, folder: Path, dataset: Path) -> list[str]:
    return [
        *TINY,
        f"run.name={run.name}",
        f"run.output_dir={folder / run.name}",
        f"data.dataset={dataset}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *run.overrides,
    ]


def environment(folder: Path) -> dict[str, str]:
    extra = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **extra, "PATH": path}


def without_mlflow(folder: Path) -> str:
    """A PYTHONPATH with which MLflow cannot be imported: DeepSpeed's launchers do, for seconds, wherever they can."""
    folder.mkdir(exist_ok=True)
    (folder / "mlflow.py").write_text("raise ImportError")
    return os.pathsep.join([str(folder), str(ROOT)])


def start_ranks(arguments: list[str], folder: Path, processes: int = 2) -> list[Fork]:
    """`python ARGUMENTS` on every rank, the output of rank N in `folder/rank-N.out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if not (folder / "mlflow.db").exists():
        shutil.copy(empty_store(), folder / "mlflow.db")  # to make its tables takes seconds
    started = []
    for rank in range(processes):
        ranked = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(start(arguments, environment(folder) | ranked, folder / f"rank-{rank}.out"))
    return started


def wait(processes: list[Fork], folder: Path, timeout_seconds: float = 900) -> list[int]:
    """Exit codes; a rank that another one left waiting is killed once one has failed."""
    try:
        return [process.wait(timeout_seconds if not index else 60) for index, process in enumerate(processes)]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # faulthandler says where it was
            process.wait()
        raise AssertionError(outputs(folder)) from None


def outputs(folder: Path) -> str:
    return "\n".join(f"--- {item.name}\n{item.read_text()}" for item in sorted(folder.glob("rank-*.out")))


def start_plan(
    runs: list[Run], folder: Path, dataset: Path, processes: int = 2, program: str = "tests.pipeline.ranks"
) -> list[Fork]:
    """The ranks that train every run of the plan, in order."""
    plan = [
        {
            "name": run.name,
            "copy_checkpoint": run.copy_checkpoint,
            "overrides": tiny_overrides(run, folder, dataset),
            "moment": asdict(run.moment) if run.moment else None,
            "poison": asdict(run.poison) if run.poison else None,
            "left_out": run.left_out,
        }
        for run in runs
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    return start_ranks(["-m", program, str(folder)], folder, processes)


def run_ranks(
    runs: list[Run], folder: Path, dataset: Path, processes: int = 2, program: str = "tests.pipeline.ranks"
) -> list[dict[str, Any]]:
    """Train every run of the plan, in order. Returns a run's result: exit code, problems."""
    started = start_plan(runs, folder, dataset, processes, program)
    codes = wait(started, folder, timeout_seconds=1200)
    assert codes == [0] * processes, outputs(folder)
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def main(folder: Path) -> None:
    from data_prep.errors import UserError
    from pipeline.config import load_config
    from pipeline.distributed import world as ranks
    from pipeline.distributed.clock import Clock
    from pipeline.distributed.stop import StopRequest
    from pipeline.health.decisions import write_decisions
    from pipeline.health.state import RollBack
    from pipeline.train import open_log, run

    world, results = ranks.start(), []
    for item in json.loads((folder / "plan.json").read_text()):
        result: dict[str, Any] = {"name": item["name"], "code": None, "problems": []}
        try:
            config = load_config("launch/runs/quickstart.yaml", item["overrides"])
            if item["copy_checkpoint"] and world.is_main:
                source, step = item["copy_checkpoint"].split("/")
                target = config.run_folder / "checkpoints" / step
                shutil.copytree(folder / source / "checkpoints" / step, target)
            world.barrier()
            config.run_folder.mkdir(parents=True, exist_ok=True)
            logging.getLogger("globallocal").handlers.clear()  # each run has its own log
            open_log(config.run_folder, world.rank)
            if item["left_out"] and world.is_main:
                decided = [RollBack(step=0, to_step=0, first_batch=a, last_batch=b) for a, b in item["left_out"]]
                write_decisions(config.run_folder, decided)
            with ExitStack() as circumstances:
                if item["moment"]:
                    circumstances.enter_context(happening(Moment(**item["moment"]), world.rank))
                if item["poison"]:
                    circumstances.enter_context(poisoned(Poison(**item["poison"])))
                result["code"] = run(config, world, StopRequest(), Clock())
        except UserError as error:
            result |= {"code": error.exit_code, "problems": error.problems}
        results.append(result)
    if world.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    ranks.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

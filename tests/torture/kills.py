"""SIGKILL of one rank, and of all, at random moments, writing included; then the run must be as if unbroken.

A fifth of the kills falls at any moment of a start; of the others half at any moment of training, half inside a save:
as soon as a folder under a temporary name is seen. `KILLS` in the environment sets how many (50). The ranks are forked
from one process that has imported everything, since importing takes longer than anything else in a start.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from launch.hosts.node import free_port
from pipeline.checkpoints.folder import SAVING, list_checkpoints, step_of, verify
from tests.conftest import globallocal
from tests.pipeline.comparing import assert_same_state, losses_of
from tests.pipeline.ranks import Run, environment, outputs, tiny_overrides

forks = multiprocessing.get_context("forkserver")
STEPS = 600
INTERVAL = 5
RANKS = 2
PATIENCE_SECONDS = 1800
START_SECONDS = 8


def run(folder: Path) -> dict[str, object]:
    kills, seed = int(os.environ.get("KILLS", "50")), random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    generator = random.Random(seed)
    dataset = prepare(folder)
    os.environ.update(environment(folder))  # the process that ranks are forked from inherits it
    forks.set_forkserver_preload(["pipeline.train", __name__])
    unbroken = folder / "unbroken"
    unbroken.mkdir()
    assert wait(start(unbroken, dataset)) == [0] * RANKS, outputs(unbroken)
    torn, counts = folder / "torn", {"killed": 0, "one rank": 0, "inside a save": 0, "in a start": 0}
    torn.mkdir()
    while counts["killed"] < kills:
        if list_checkpoints(torn / "run" / "checkpoints")[:1] == [torn / "run" / "checkpoints" / last()]:
            compare(unbroken, torn)
            shutil.rmtree(torn)
            torn.mkdir()
        kill_once(torn, dataset, generator, counts)
        print(f"{counts['killed']} of {kills} kills, at step {reached(torn)}", flush=True)
    assert wait(start(torn, dataset)) == [0] * RANKS, outputs(torn)
    compare(unbroken, torn)
    return {
        "SIGKILLs": counts["killed"],
        "… of one rank of two": counts["one rank"],
        "… inside a save": counts["inside a save"],
        "… before a start's first checkpoint": counts["in a start"],
        "steps of the run": STEPS,
        "losses, weights, optimizer, random state": "bitwise those of the unbroken run",
        "samples": "each step's global batch, once",
        "MLflow": "one run, no step twice",
        "seed": seed,
    }


def prepare(folder: Path) -> Path:
    globallocal("tokenizer", "--source", "sample", "--vocab-size", 512, "--output", folder / "tokenizer")
    globallocal("prepare", "--source", "sample", "--tokenizer", folder / "tokenizer", "--output", folder / "data")
    return folder / "data"


def last() -> str:
    return f"step-{STEPS:08d}"


def start(folder: Path, dataset: Path) -> list[BaseProcess]:
    overrides = [
        f"training.max_steps={STEPS}",
        f"checkpoint.interval_steps={INTERVAL}",
        f"evaluation.interval_steps={STEPS}",
        "checkpoint.keep_last=2",
    ]
    words = tiny_overrides(Run("run", overrides), folder, dataset)
    port = free_port()
    arguments = ["--config", "launch/runs/quickstart.yaml", *words]
    ranks = [forks.Process(target=train, args=(folder, rank, port, arguments), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    return ranks


def train(folder: Path, rank: int, port: int, arguments: list[str]) -> None:
    """In a process of its own: one rank, as `python pipeline/train.py ARGUMENTS` is one."""
    from pipeline.train import main

    with open(folder / f"rank-{rank}.out", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    sys.exit(main(arguments))


def wait(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes; None of a rank that has not ended."""
    for process in processes:
        process.join(PATIENCE_SECONDS)
    return [process.exitcode for process in processes]


def kill_once(folder: Path, dataset: Path, generator: random.Random, counts: dict[str, int]) -> None:
    """Start the run, mostly let it come as far as one more checkpoint, and kill one rank or all of it."""
    root = folder / "run" / "checkpoints"
    before = list_checkpoints(root)[:1]
    processes = start(folder, dataset)
    deadline = time.monotonic() + PATIENCE_SECONDS
    early = generator.random() < 0.2
    while list_checkpoints(root)[:1] == before and not early:
        assert time.monotonic() < deadline, outputs(folder)
        assert all(process.is_alive() for process in processes), outputs(folder)
        time.sleep(0.01)
    if early:
        time.sleep(generator.uniform(0, START_SECONDS))
    elif generator.random() < 0.5:
        while not list(root.glob(f"{SAVING}*")) and processes[0].is_alive():
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.03))
    else:
        time.sleep(generator.uniform(0, 2))
    inside = bool(list(root.glob(f"{SAVING}*")))
    alive = all(process.is_alive() for process in processes)
    first = generator.choice(processes)
    first.kill()
    if generator.random() < 0.5:
        counts["one rank"] += alive
        time.sleep(generator.uniform(0, 1))  # the other rank goes on, or stands in a collective
    for process in processes:
        process.kill()
        process.join()
    counts["killed"] += alive
    counts["inside a save"] += alive and inside
    counts["in a start"] += alive and list_checkpoints(root)[:1] == before
    whole = [item for item in list_checkpoints(root) if not verify(item)]
    assert whole or not before, f"no checkpoint verifies in {root}"


def reached(folder: Path) -> int:
    return max(map(step_of, list_checkpoints(folder / "run" / "checkpoints")), default=0)


def compare(unbroken: Path, torn: Path) -> None:
    """Raises AssertionError where the torn run shows that it was torn."""
    step = Path("run/checkpoints") / last()
    assert_same_state(unbroken / step, torn / step)
    losses = losses_of(torn, "run")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == losses_of(unbroken, "run")  # the same samples: another batch gives another loss
    consumed = {json.loads((item / step / "state.json").read_text())["consumed_samples"] for item in (unbroken, torn)}
    assert len(consumed) == 1
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{torn}/mlflow.db")
    experiments = [item.experiment_id for item in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len(runs) == 1, f"{len(runs)} MLflow runs"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "loss/train")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))

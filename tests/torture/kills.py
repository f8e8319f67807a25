"""SIGKILL of one rank, and of all, at random moments, writing included; then the run must be as if unbroken.

Half of the kills fall at any moment of training, half inside a save: as soon as a folder under a temporary name
is seen. `KILLS` in the environment sets how many (50).
"""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

from pipeline.checkpoint import SAVING, list_checkpoints, verify
from tests.conftest import globallocal
from tests.pipeline.ranks import Run, outputs, start_ranks, tiny_overrides, wait
from tests.pipeline.test_training import assert_same_state, losses_of

STEPS = 600
INTERVAL = 5
PATIENCE_SECONDS = 1800


def run(folder: Path) -> dict[str, object]:
    kills, seed = int(os.environ.get("KILLS", "50")), random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    generator = random.Random(seed)
    dataset = prepare(folder)
    unbroken = folder / "unbroken"
    unbroken.mkdir()
    assert wait(start(unbroken, dataset), unbroken, PATIENCE_SECONDS) == [0, 0], outputs(unbroken)
    torn, counts = folder / "torn", {"killed": 0, "one rank": 0, "inside a save": 0, "runs begun": 0}
    torn.mkdir()
    while counts["killed"] < kills:
        if list_checkpoints(torn / "run" / "checkpoints")[:1] == [torn / "run" / "checkpoints" / last()]:
            compare(unbroken, torn)
            shutil.rmtree(torn)
            torn.mkdir()
        kill_once(torn, dataset, generator, counts)
        print(f"{counts['killed']} of {kills} kills, at step {reached(torn)}", flush=True)
    assert wait(start(torn, dataset), torn, PATIENCE_SECONDS) == [0, 0], outputs(torn)
    compare(unbroken, torn)
    return {
        "SIGKILLs": counts["killed"],
        "… of one rank of two": counts["one rank"],
        "… inside a save": counts["inside a save"],
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


def start(folder: Path, dataset: Path) -> list[subprocess.Popen[bytes]]:
    overrides = [
        f"training.max_steps={STEPS}",
        f"checkpoint.interval_steps={INTERVAL}",
        f"evaluation.interval_steps={STEPS}",
        "checkpoint.keep_last=2",
    ]
    words = tiny_overrides(Run("run", overrides), folder, dataset)
    return start_ranks(["pipeline/train.py", "--config", "launch/runs/quickstart.yaml", *words], folder)


def kill_once(folder: Path, dataset: Path, generator: random.Random, counts: dict[str, int]) -> None:
    """Start the run, let it come as far as one more checkpoint, and kill one rank or all of it."""
    root = folder / "run" / "checkpoints"
    before = list_checkpoints(root)[:1]
    processes = start(folder, dataset)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while list_checkpoints(root)[:1] == before:
        assert time.monotonic() < deadline, outputs(folder)
        assert all(process.poll() is None for process in processes), outputs(folder)
        time.sleep(0.01)
    if generator.random() < 0.5:
        while not list(root.glob(f"{SAVING}*")) and processes[0].poll() is None:
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.03))
    else:
        time.sleep(generator.uniform(0, 2))
    inside = bool(list(root.glob(f"{SAVING}*")))
    alive = all(process.poll() is None for process in processes)
    first = generator.choice(processes)
    first.kill()
    if generator.random() < 0.5:
        counts["one rank"] += alive
        time.sleep(generator.uniform(0, 1))  # the other rank goes on, or stands in a collective
    for process in processes:
        process.kill()
        process.wait()
    counts["killed"] += alive
    counts["inside a save"] += alive and inside
    whole = [item for item in list_checkpoints(root) if not verify(item)]
    assert whole, f"no checkpoint verifies in {root}"


def reached(folder: Path) -> int:
    return int(list_checkpoints(folder / "run" / "checkpoints")[0].name[5:])


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
    history = client.get_metric_history(runs[0].info.run_id, "train/language_loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))

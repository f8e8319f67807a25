"""Ranks that stop moving, in every phase, on every rank, under every ZeRO stage; and stops through real launchers."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.hosts.node import free_port
from launch.jobs.session import TRAIN_PROGRAM
from pipeline.checkpoints.folder import list_checkpoints, verify
from pipeline.exit_codes import HANG, PREEMPTED
from tests.conftest import ROOT, globallocal
from tests.pipeline.comparing import assert_same_state, living, losses_of, said
from tests.pipeline.hangs import write_plan
from tests.pipeline.moments import Moment
from tests.pipeline.ranks import Run, environment, outputs, start_ranks, tiny_overrides, wait

PLACES = {"start": 1, "data": 3, "forward": 4, "backward": 3, "step": 4, "evaluation": 1, "saving": 1}
HANG_SECONDS = 12
CONFIG = "--config=launch/runs/quickstart.yaml"


def run(folder: Path) -> dict[str, object]:
    globallocal("tokenizer", "--source", "sample", "--vocab-size", 512, "--output", folder / "tokenizer")
    globallocal("prepare", "--source", "sample", "--tokenizer", folder / "tokenizer", "--output", folder / "data")
    figures = {}
    for what, test in (
        ("a rank asleep for ever", asleep),
        ("a rank under SIGSTOP, `globallocal launch`", through_our_launcher),
        ("SIGTERM to DeepSpeed's launcher of a node", through_deepspeed),
        ("SIGTERM at random moments", stopped_at_random),
    ):
        place = folder / test.__name__
        place.mkdir()
        figures[what] = test(place, folder / "data")
        print(f"{what}: {figures[what]}", flush=True)
    return figures


def asleep(folder: Path, dataset: Path) -> str:
    count = 0
    for stage in (0, 2, 3):
        cases = {
            f"{place}-{rank}": Moment(place, at, rank, ("sleep",)) for place, at in PLACES.items() for rank in (0, 1)
        }
        here = folder / f"stage-{stage}"
        here.mkdir()
        settings = [f"training.hang_timeout_seconds={HANG_SECONDS}", f"deepspeed.config=ds_configs/zero{stage}.json"]
        write_plan(cases, here, dataset, settings)
        command = [sys.executable, "-m", "tests.pipeline.hangs", str(here)]
        subprocess.run(command, cwd=ROOT, env=environment(here), check=True)
        for name, codes in json.loads((here / "results.json").read_text()).items():
            place, rank = name.split("-")
            text = said(here / name)
            assert codes == [HANG] * 2, text
            assert re.search(rf"hang: rank {rank} \(host .*\) has not moved for \d+ s in {place}, ", text), text
            count += 1
    return f"{count} jobs, each phase × rank × ZeRO 0, 2, 3: all ended with code 76, rank and phase named"


def start_job(folder: Path, command: list[str], settings: list[str], dataset: Path) -> "subprocess.Popen[bytes]":
    """A run that would go on for ever, until its first checkpoint stands."""
    endless = ["training.max_steps=1000000", "checkpoint.interval_steps=5", "evaluation.interval_steps=1000000"]
    overrides = tiny_overrides(Run("run", [*endless, *settings]), folder, dataset)
    with open(folder / "output", "wb") as output:
        words = [*command, CONFIG, *overrides]
        job = subprocess.Popen(words, cwd=ROOT, env=environment(folder), stdout=output, stderr=subprocess.STDOUT)
    until(lambda: list_checkpoints(folder / "run" / "checkpoints"), folder, job)
    return job


def until(true: Callable[[], object], folder: Path, job: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert job.poll() is None, (folder / "output").read_text()
        assert time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.2)


def through_our_launcher(folder: Path, dataset: Path) -> str:
    """A stopped rank ends the job, which is started again; then a signal ends it for good."""
    command = [sys.executable, "-m", "launch", "launch", "--local=2", "--max-restarts=1"]
    job = start_job(folder, command, [f"training.hang_timeout_seconds={HANG_SECONDS}"], dataset)
    ranks = [process for process in living(folder) if str(TRAIN_PROGRAM) in process.cmdline()[:3]]
    ranks[1].suspend()  # the two oldest are the job's; a standby's follow
    restarts = folder / "run" / "restarts.jsonl"
    until(restarts.exists, folder, job)
    text = restarts.read_text()
    assert "gave no sign of life" in text, text
    standing = list_checkpoints(folder / "run" / "checkpoints")[0]
    until(lambda: list_checkpoints(folder / "run" / "checkpoints")[0] != standing, folder, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=600) == PREEMPTED, (folder / "output").read_text()
    assert living(folder) == []
    return "named in restarts.jsonl, killed, started again; then SIGTERM: code 75, nobody left"


def through_deepspeed(folder: Path, dataset: Path) -> str:
    """DeepSpeed's launcher of a node hears the signal alone; it tells one rank after another, and kills after 30 s."""
    program = str(Path(sys.executable).with_name("deepspeed"))
    options = ["--hostfile=none", "--num_accelerators=2", f"--master_port={free_port()}", str(TRAIN_PROGRAM)]
    job = start_job(folder, [program, *options], [], dataset)
    next(item for item in living(folder) if "deepspeed.launcher.launch" in item.cmdline()).terminate()
    code = job.wait(timeout=600)
    assert living(folder) == []
    assert code != 0
    assert verify(list_checkpoints(folder / "run" / "checkpoints")[0]) == []
    assert "preempted" in (folder / "run" / "tracking" / "spool.jsonl").read_text()
    return f"exit code {code}, nobody left, a whole checkpoint, MLflow KILLED"


def begun(folder: Path) -> int:
    """How many starts have come to their first step."""
    log = folder / "run" / "logs" / "rank-00000.log"
    return len(re.findall(r"resume verified|starting at step 0", log.read_text())) if log.exists() else 0


def stopped_at_random(folder: Path, dataset: Path, stops: int = 10) -> str:
    """Signals at random moments to a random rank; what is left at the end is the unbroken run."""
    steps = ["training.max_steps=60", "checkpoint.interval_steps=25", "evaluation.interval_steps=10"]
    done = 0
    for name in ("unbroken", "stopped"):
        here = folder / name
        here.mkdir()
        arguments = ["pipeline/train.py", CONFIG, *tiny_overrides(Run("run", steps), here, dataset)]
        codes = [PREEMPTED] * 2
        while codes == [PREEMPTED] * 2:
            ranks = start_ranks(arguments, here)
            if name == "stopped" and done < stops:
                had = begun(here)
                while begun(here) == had:
                    time.sleep(0.05)
                time.sleep(random.uniform(0, 2))
                random.choice(ranks).send_signal(signal.SIGTERM)
                done += 1
            codes = wait(ranks, here)
        assert codes == [0, 0], outputs(here)
    for metric in ("loss/train", "loss/valid"):
        assert losses_of(folder / "stopped", "run", metric) == losses_of(folder / "unbroken", "run", metric)
    last = Path("run/checkpoints/step-00000060")
    assert_same_state(folder / "unbroken" / last, folder / "stopped" / last)
    return f"{done}, to one rank of two: bitwise the unbroken run, evaluations included"

"""The night when a machine dies: killed without warning, or asked to stop, then started again with the same words."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from launch.hosts import node
from launch.jobs.session import TRAIN_PROGRAM
from pipeline.checkpoints.folder import JOB_VARIABLE, list_checkpoints, step_of
from pipeline.exit_codes import PREEMPTED
from tests.conftest import ROOT
from tests.forks import start
from tests.pipeline.comparing import assert_same_state, living, losses_of
from tests.pipeline.ranks import Run, environment, outputs, start_ranks, tiny_overrides, wait, without_mlflow

STEPS = 40
LAST = f"checkpoints/step-{STEPS:08d}"


def arguments(name: str, folder: Path, dataset: Path) -> list[str]:
    overrides = [f"training.max_steps={STEPS}", "checkpoint.interval_steps=5", "evaluation.interval_steps=20"]
    run = Run(name, [*overrides, "model.num_hidden_layers=1"])
    return ["pipeline/train.py", "--config", "launch/runs/quickstart.yaml", *tiny_overrides(run, folder, dataset)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    codes = wait(start_ranks(arguments("run", folder, small_dataset), folder), folder)
    assert codes == [0, 0], outputs(folder)
    return folder


def wait_for_checkpoint(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    while not list_checkpoints(folder / "run" / "checkpoints"):
        assert all(process.poll() is None for process in processes), outputs(folder)
        time.sleep(0.02)


def test_sigkill_and_a_signal_at_any_moment_cost_nothing(unbroken: Path, tmp_path: Path, small_dataset: Path) -> None:
    """All ranks die at a moment drawn anew each time, writing included; at the next start one of them is asked to
    stop, and all do, with everything saved; then the run ends as if unbroken."""
    processes = start_ranks(arguments("run", tmp_path, small_dataset), tmp_path)
    wait_for_checkpoint(tmp_path, processes)
    time.sleep(random.uniform(0, 3))
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()

    log = tmp_path / "run" / "logs" / "rank-00000.log"
    processes = start_ranks(arguments("run", tmp_path, small_dataset), tmp_path)
    while not re.search("resume verified.* step [0-9]+/", log.read_text(), re.DOTALL) and processes[1].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    processes[1].send_signal(signal.SIGTERM)
    codes = wait(processes, tmp_path)
    assert codes in ([PREEMPTED] * 2, [0, 0]), outputs(tmp_path)
    stopped_at = int(list_checkpoints(tmp_path / "run" / "checkpoints")[0].name[5:])
    assert int(re.findall(" step ([0-9]+)/", log.read_text())[-1]) == stopped_at

    codes = wait(start_ranks(arguments("run", tmp_path, small_dataset), tmp_path), tmp_path)
    assert codes == [0, 0], outputs(tmp_path)
    assert_same_state(unbroken / "run" / LAST, tmp_path / "run" / LAST)
    assert losses_of(tmp_path, "run") == losses_of(unbroken, "run")
    assert sorted(losses_of(tmp_path, "run")) == list(range(1, STEPS + 1))


def test_a_job_that_begins_at_a_folder_is_started_again_from_its_own_newest(
    unbroken: Path, tmp_path: Path, small_dataset: Path
) -> None:
    begins = unbroken / "run" / "checkpoints" / "step-00000030"
    words = [
        *arguments("run", tmp_path, small_dataset)[1:],
        f"checkpoint.resume={begins}",
        "training.max_steps=1000000",
        "tracking.enabled=false",
    ]
    root, restarts = tmp_path / "run" / "checkpoints", tmp_path / "run" / "restarts.jsonl"
    with open(tmp_path / "output", "wb") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "launch", "launch", "--local=2", "--max-restarts=1", *words],
            cwd=ROOT,
            env=environment(tmp_path) | {"PYTHONPATH": without_mlflow(tmp_path / "python")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def until(newest: int) -> int:
        """The newest step, once it is later."""
        while not (standing := list_checkpoints(root)) or step_of(standing[0]) <= newest:
            assert job.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.1)
        return step_of(standing[0])

    until(30)
    next(item for item in living(tmp_path) if str(TRAIN_PROGRAM) in item.cmdline()[:3]).kill()
    while not restarts.exists():
        assert job.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    until(step_of(list_checkpoints(root)[0]))
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=300) == PREEMPTED
    said = (tmp_path / "output").read_text().splitlines()
    assert ["standby" in line for line in said if line.startswith("start ")] == [False, True]
    first, second = [line for line in said if line.startswith("resuming ")]
    assert first == f"resuming from {begins}"
    assert second.startswith(f"resuming from {root}/step-")

    codes = wait(start_ranks(["pipeline/train.py", *words], tmp_path), tmp_path)  # another job, the same words
    assert codes == [2, 2]
    assert f"{begins} is of step 30, but {root} holds 3 of later steps" in outputs(tmp_path)


def test_the_launchers_and_the_ranks_mean_the_same_variable() -> None:
    assert node.JOB_VARIABLE == JOB_VARIABLE


def test_two_jobs_cannot_write_into_one_run(unbroken: Path, small_dataset: Path, tmp_path: Path) -> None:
    first = start_ranks(arguments("run", tmp_path, small_dataset), tmp_path)
    wait_for_checkpoint(tmp_path, first)
    (tmp_path / "second").mkdir()
    second = start_ranks(arguments("run", tmp_path, small_dataset), tmp_path / "second", processes=1)
    for process in first:
        process.send_signal(signal.SIGSTOP)
    codes = wait(second, tmp_path / "second")
    for process in first:
        process.kill()
        process.wait()
    assert codes == [2]
    assert "another job is writing there (host " in outputs(tmp_path / "second")


def test_a_compilation_killed_earlier_does_not_stop_later_starts(tmp_path: Path) -> None:
    """torch waits for ever for the lock file of a compiler that is gone."""
    load = tmp_path / "load.py"
    load.write_text("from pipeline.engine.operators import load_operator; load_operator('CPUAdamBuilder')")
    first = start([str(load)], environment(tmp_path), tmp_path / "rank-0.out")
    assert first.wait() == 0, outputs(tmp_path)
    built = Path(_get_build_directory("cpu_adam", False))
    shutil.copytree(built, tmp_path / "extensions" / built.name)
    (tmp_path / "extensions" / built.name / "lock").touch()
    own = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    later = start([str(load)], environment(tmp_path) | own, tmp_path / "rank-1.out")
    try:
        assert later.wait(120) == 0, outputs(tmp_path)
    finally:
        later.kill()


def test_a_start_on_cpus_compiles_nothing_and_leaves_no_shared_memory(
    tmp_path: Path, small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    before = set(Path("/dev/shm").glob("deepspeed*"))
    words = [*arguments("run", tmp_path, small_dataset), "training.max_steps=1", "optimizer.warmup_steps=1"]
    codes = wait(start_ranks(words, tmp_path), tmp_path)
    assert codes == [0, 0], outputs(tmp_path)
    assert not (tmp_path / "extensions").exists()
    assert set(Path("/dev/shm").glob("deepspeed*")) <= before

"""Jobs on a real Slurm: two nodes, ZeRO-3 over both; they come back, or they say in a line why not."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster.jobs import SECONDS, Run
from tests.cluster.slurm import MARK, Slurm
from tests.conftest import ROOT

TWO_NODES = ("--slurm", "--nodes", 2, "--master-addr", "127.0.0.1")


def restarts(run: Run) -> list[dict]:
    path = run.run_folder / "restarts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def job_number(run: Run) -> str:
    if run.launches[-1].poll() is None:
        run.wait_until(lambda: run.output.startswith("job "))
    return run.output.split(":")[0].removeprefix("job ")


def wait_for(slurm: Slurm, run: Run, condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, run.log + slurm.logs()
        time.sleep(0.1)


def test_a_job_out_of_time_and_a_dead_rank_cost_no_sample(
    two_slurm_nodes: Slurm, run: Run, unbroken: dict[int, str]
) -> None:
    """Slurm's own time limit ends the first start, SIGKILL of a rank the second; the losses are the unbroken run's."""
    slurm = two_slurm_nodes
    options = (*TWO_NODES, "--time", 60, "--sbatch=--signal=B:USR1@5", "--env", "AWKWARD", "--wait")
    awkward = "a b  (c) $HOME `id` \"quoted\" 'single' \\ back % * ; & | < > é"
    run.launch(*options, AWKWARD=awkward, MLFLOW_TRACKING_PASSWORD="hunter2", **slurm.environment)
    number = job_number(run)
    run.wait_until(run.steps_saved)
    ranks = run.ranks()
    assert [rank.environ()["AWKWARD"] for rank in ranks] == [awkward] * 2
    assert {rank.environ()["SLURMD_NODENAME"] for rank in ranks} == {"s0", "s1"}
    assert "hunter2" not in run.output + run.log + (run.run_folder / "launch" / "job.sbatch").read_text()
    for rank in ranks:  # they are slow, and Slurm's clock goes on
        rank.suspend()
    slurm.run("scontrol", "update", f"JobId={number}", "EndTime=now+40")
    run.wait_until(lambda: "SIGUSR1: the ranks save and stop" in run.log)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # a busy machine takes longer than 5 s to save
    for rank in ranks:
        rank.resume()
    run.wait_until(lambda: restarts(run))
    saved = run.steps_saved()[-1]
    old = {rank.pid for rank in ranks}
    run.wait_until(lambda: [rank for rank in run.ranks() if rank.pid not in old])
    next(rank for rank in run.ranks() if rank.pid not in old).send_signal(signal.SIGKILL)
    run.finish()
    first, second = restarts(run)
    assert (first["code"], first["step"], first["reason"]) == (
        75,
        saved,
        f"started again from the checkpoint of step {saved}",
    )
    assert second["cause"].endswith("failed: Killed")
    assert second["reason"] == f"restart 1 of at most 3, from the checkpoint of step {saved}"
    assert run.losses() == unbroken
    assert "COMPLETED" in run.output
    assert run.ranks() == []


def test_scancel_saves_and_the_rest_of_an_array_goes_on_or_not(two_slurm_nodes: Slurm, run: Run) -> None:
    """Jobs in turn: a notice ends the first and the second goes on; scancel of the whole ends it, with all saved."""
    slurm = two_slurm_nodes
    run.launch(*TWO_NODES, "--turns", 3, "training.max_steps=999", **slurm.environment)
    run.finish()
    number = job_number(run)
    wait_for(slurm, run, run.steps_saved)
    # Slurm 22.05 signals the script, calls the job "in transition", and tries again until it has ended: no success.
    slurm.run("scancel", "--batch", "--signal=USR1", f"{number}_1", check=False)
    wait_for(slurm, run, lambda: len(restarts(run)) == 1)
    assert restarts(run)[0]["cause"].startswith("preempted")
    saved = run.steps_saved()[-1]
    wait_for(slurm, run, lambda: f"step {saved + 2}/999" in run.log)
    slurm.run("scancel", number)
    wait_for(slurm, run, lambda: not slurm.run("squeue", "--noheader").strip())
    assert run.steps_saved()[-1] > saved
    assert run.ranks() == []
    assert [entry["restart"] for entry in restarts(run)[1:]] in ([], [False])


def test_a_crash_loop_ends_and_a_node_that_failed_twice_is_left_out(two_slurm_nodes: Slurm, tmp_path: Path) -> None:
    slurm, folder = two_slurm_nodes, tmp_path / "run"
    folder.mkdir()
    batch = f"{sys.executable} -m launch.jobs.slurm_batch --run-folder {folder} --max-restarts 9 --grace-seconds 30"
    (tmp_path / "job.sbatch").write_text(
        f"#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=1 --requeue --open-mode=append --output={tmp_path}/log\n"
        f"export PYTHONPATH={ROOT}\n"
        f"exec {batch} --master-addr 127.0.0.1 -- srun bash -c 'echo on $SLURMD_NODENAME; exit 3'\n"
    )
    slurm.run("sbatch", str(tmp_path / "job.sbatch"))
    deadline = time.monotonic() + SECONDS
    while slurm.run("squeue", "--noheader").strip():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.5)
    said = (tmp_path / "log").read_text()
    assert re.findall(r"^on (s\d)$", said, flags=re.MULTILINE) == ["s0", "s0", "s1"]
    assert "globallocal: s0 failed twice in a row and is left out from now on" in said
    assert "crash loop: 3 failures in a row before the first checkpoint; not started again" in said
    entries = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    assert [(entry["node"], entry["code"], entry["restart"]) for entry in entries] == [
        ("s0", 3, True),
        ("s0", 3, True),
        ("s1", 3, False),
    ]


def test_a_job_that_fails_for_good_is_failed_in_mlflow(two_slurm_nodes: Slurm, run: Run) -> None:
    """All ranks are killed, rank 0 too: nobody of them could say it. The store is in the ranks' environment only."""
    slurm, store = two_slurm_nodes, f"sqlite:///{run.folder}/tracked.db"
    options = (*TWO_NODES, "--max-restarts", 0, f"--sbatch=--export=PATH,SLURM_CONF,{MARK}", "--wait")
    overrides = ("training.max_steps=999", "tracking.enabled=true")
    run.launch(*options, *overrides, MLFLOW_TRACKING_URI=store, **slurm.environment)
    run.wait_until(lambda: "step 2/999" in run.log)
    for rank in run.ranks():
        rank.kill()
    run.finish(expect=1)
    client = MlflowClient(store)
    (tracked,) = client.search_runs([client.get_experiment_by_name("globallocal").experiment_id])
    assert tracked.info.status == "FAILED"
    assert "report.html" in [item.path for item in client.list_artifacts(tracked.info.run_id)]
    said = run.log[run.log.index("not started again by itself") :]
    assert re.search(r"^\S+ +failed, \d+ of 999 steps$", said, flags=re.MULTILINE)
    assert "report.html\n" in said


def test_what_cannot_be_queued_or_started_is_said_in_plain_lines(two_slurm_nodes: Slurm, run: Run) -> None:
    slurm = two_slurm_nodes
    run.launch(*TWO_NODES, "--partition", "nowhere", **slurm.environment)
    run.finish(expect=2)
    assert run.output.startswith("error: sbatch: ")
    assert "invalid partition specified: nowhere" in run.output

    run.launch(*TWO_NODES, "--wait", "data.dataset=/nowhere", **slurm.environment)
    run.finish(expect=1)
    assert "error: /nowhere: no such dataset folder" in run.output
    assert "refused by the ranks (exit code 2); a mistake to fix, said above; a restart would meet it again" in run.log
    assert len(restarts(run)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "two"), "error: --nodes two: give a number, or MIN-MAX"),
        (("--sbatch", "gpus=8"), "error: --sbatch gpus=8: write it as sbatch takes it, such as --sbatch=--account="),
        (("--local", 2), "error: give one of --local N, --hostfile FILE and --slurm"),
    ],
)
def test_wrong_options_are_refused(run: Run, options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    run.launch("--slurm", *options)
    run.finish(expect=2)
    assert run.output.startswith(said)

"""Asked to stop at any moment: a whole checkpoint stands, the run ends as preempted, and goes on as if unbroken."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from launch.hosts.node import free_port, port_is_free
from pipeline.checkpoints.folder import list_checkpoints, read_state, verify
from pipeline.config import load_config
from pipeline.distributed.stop import plan
from pipeline.exit_codes import PREEMPTED
from tests.conftest import ROOT
from tests.forks import start
from tests.pipeline.comparing import Runs, assert_same_state, living, losses_of
from tests.pipeline.moments import Moment
from tests.pipeline.ranks import Run, environment, outputs, run_ranks, tiny_overrides, without_mlflow
from tests.pipeline.servers_fixture import wait_until
from tests.variants import some_of


@dataclass(frozen=True)
class Case:
    """A run of 6 steps of 2 micro-steps, evaluated and saved at 3 and 6, that is stopped and started again.

    Attributes:
        stops_at: the step of the newest checkpoint then; None where there is none.
        pending: its evaluation is still to be done.
        again: what happens at the second start; the third ends it.
        stage: of ZeRO.
        says: in the log of the stopped start.
        tracked: by MLflow too, which takes half of rank 0's time.
    """

    moment: Moment
    stops_at: int | None
    pending: bool = False
    again: Moment | None = None
    stage: int = 2
    says: str = "SIGTERM: stopping after step"
    tracked: bool = False


SECOND_BATCH = "evaluation/agreement"
CASES = {
    "before the first step": Case(Moment("agreement", rank=0), None, says="no step is taken yet", tracked=True),
    "in warm-up, and after the load": Case(
        Moment("forward"),
        1,
        again=Moment("agreement"),
        says="another rank's signal: stopping after step 1",
        tracked=True,
    ),
    "in accumulation": Case(Moment("backward", 9, rank=0), 5, says="SIGTERM: stopping after step 5"),
    "while the optimizer steps": Case(Moment("step", 8, do=("SIGUSR1",)), 5, says="another rank's signal"),
    "in an evaluation, twice": Case(Moment(SECOND_BATCH, 2, rank=0), 3, True, Moment(SECOND_BATCH, 1)),
    "in the last evaluation": Case(Moment(SECOND_BATCH, 4), 6, True, says="another rank's signal"),
    "in a save, three signals": Case(
        Moment("saving", rank=0, do=("SIGTERM", "SIGINT", "SIGTERM"), every=True), 3, says="this step is saved"
    ),
    **{
        f"no time to finish the step, stage {stage}": Case(
            Moment("backward", 9, rank=0, slow=("step",)), 4, stage=stage
        )
        for stage in some_of([2, 3], [0, 1])
    },
    "no time for anything": Case(
        Moment("backward", 9, rank=0, slow=("step", "save")),
        3,
        says="is not saved: the last save took",
        tracked=True,
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs and, in order, their results."""
    folder = tmp_path_factory.mktemp("stopped")
    plan = []
    for name, case in CASES.items():
        settings = [f"deepspeed.config=ds_configs/zero{case.stage}.json"]
        settings += [] if case.tracked else ["tracking.enabled=false"]
        for moment in (case.moment, case.again, None) if case.again else (case.moment, None):
            plan.append(Run(slug(name), settings, moment=moment))
    endless = ["training.max_steps=1000000", "training.log_interval_steps=1000000"]
    rare = ["checkpoint.interval_steps=1000000", "evaluation.interval_steps=1000000"]
    plan.append(Run("budget", [*endless, *rare, "training.max_seconds=2", "tracking.enabled=false"]))
    return folder, run_ranks(plan, folder, small_dataset)


def slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def log_of(run_folder: Path) -> str:
    return (run_folder / "logs" / "rank-00000.log").read_text()


@pytest.mark.parametrize("name", CASES)
def test_every_start_but_the_last_is_preempted(stopped: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, results = stopped
    case = CASES[name]
    codes = [result["code"] for result in results if result["name"] == slug(name)]
    assert codes == [PREEMPTED] * (len(codes) - 1) + [0], log_of(folder / slug(name))
    assert case.says in log_of(folder / slug(name))
    if not case.tracked:
        return
    spool = folder / slug(name) / "tracking" / "spool.jsonl"
    records = [json.loads(line) for line in spool.read_text().splitlines()]
    ends = [(item["status"], item["reason"]) for item in records if item["kind"] == "status"]
    assert ends == [("RUNNING", "running"), ("KILLED", "preempted")] * (len(codes) - 1) + [
        ("RUNNING", "running"),
        ("FINISHED", "finished"),
    ]


@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_is_whole(stopped: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, case = stopped[0] / slug(name), CASES[name]
    if case.stops_at is None:
        assert log_of(folder).count("starting at step 0") == 2
        return
    saved = folder / "checkpoints" / f"step-{case.stops_at:08d}"
    assert verify(saved) == []
    assert f"resume verified: bitwise (step {case.stops_at}," in log_of(folder)
    if case.stops_at < 6:
        assert read_state(saved).pending_evaluation is case.pending


@pytest.mark.parametrize("name", CASES)
def test_it_ends_bitwise_as_the_unbroken_run(
    stopped: tuple[Path, list[dict[str, Any]]], runs: Runs, trained: Path, name: str
) -> None:
    folder, case = stopped[0], CASES[name]
    unbroken = f"unbroken-{case.stage}"
    for metric in ("loss/train", "gradient_norm", "loss/valid", "bits_per_byte"):
        assert losses_of(folder, slug(name), metric) == losses_of(trained, unbroken, metric), metric
    last = Path("checkpoints/step-00000006")
    if case.stage < 3:  # ZeRO-3 pads odd partitions with memory as it was found, and saves that too
        assert_same_state(trained / unbroken / last, folder / slug(name) / last)
    state, expected = (read_state(root / last) for root in (folder / slug(name), trained / unbroken))
    assert (state.evaluation, state.pending_evaluation) == (expected.evaluation, False)
    assert state.logit_fingerprint == expected.logit_fingerprint


def test_a_spent_time_budget_is_a_stop(stopped: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = stopped
    assert results[-1]["code"] == PREEMPTED
    text = log_of(folder / "budget")
    assert "training.max_seconds: stopping after step" in text
    saved = list_checkpoints(folder / "budget" / "checkpoints")
    assert [verify(item) for item in saved] == [[]] or "no step is taken yet" in text


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ("[SIGTERM,SIGKILL,SIGTREM]", "cannot take SIGKILL, SIGTREM; known: SIGTERM, SIGUSR1, SIGUSR2"),
        ("[SIGUSR1]", "must hold SIGTERM and SIGUSR1, with which launchers stop a job"),
    ],
)
def test_signals_that_cannot_be_taken_are_refused(signals: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("launch/runs/quickstart.yaml", [f"training.stop_signals={signals}"])


@given(st.floats(-10, 1000), st.floats(0, 1000), st.floats(0, 1000))
def test_what_is_begun_fits_and_what_fits_is_begun(left: float, step: float, save: float) -> None:
    chosen = plan(left, step, save)
    needs = {"finish the step": step + save, "save what stands": save, "leave": 0.0}
    assert chosen == "leave" or needs[chosen] <= left
    assert all(needs[other] > left for other in list(needs)[: list(needs).index(chosen)])


def test_a_rank_that_waits_for_another_to_begin_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["pipeline/train.py", "--config", "launch/runs/quickstart.yaml"]
    rank = start(words, environment(tmp_path) | place, tmp_path / "rank-0.out")
    try:
        wait_until(lambda: not port_is_free(port))  # where the ranks meet
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(25) == PREEMPTED
    finally:
        rank.kill()
    assert outputs(tmp_path).endswith("SIGTERM: stopped before the first step; nothing to save\n")


def test_through_the_launcher_a_signal_saves_and_leaves_nobody(tmp_path: Path, small_dataset: Path) -> None:
    """`globallocal train` over DeepSpeed's own launcher."""
    settings = ["training.max_steps=1000000", "checkpoint.interval_steps=5", "evaluation.interval_steps=1000000"]
    settings.append("tracking.enabled=false")
    overrides = tiny_overrides(Run("run", settings), tmp_path, small_dataset)
    command = ["-m", "launch", "train", "--processes=2", "--config=launch/runs/quickstart.yaml", *overrides]
    with open(tmp_path / "output", "wb") as output:
        job = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(tmp_path) | {"PYTHONPATH": without_mlflow(tmp_path / "python")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while not list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert job.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=300) == PREEMPTED, (tmp_path / "output").read_text()
    assert verify(list_checkpoints(tmp_path / "run" / "checkpoints")[0]) == []
    assert living(tmp_path) == []

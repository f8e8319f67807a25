"""A rank that stops moving ends the job within a bound, and is named with its host and phase."""

import json
import platform
import re
from pathlib import Path

import pytest

from pipeline.distributed.watchdog import Beat, explain, suspects
from pipeline.exit_codes import HANG
from pipeline.metrics.step_times import StepSeconds, find_straggler, times_per_step
from tests.forks import start
from tests.pipeline.comparing import said
from tests.pipeline.hangs import write_plan
from tests.pipeline.moments import Moment
from tests.pipeline.ranks import environment
from tests.variants import some_of

ASLEEP = {
    "data": Moment("data", 3, do=("sleep",)),
    "forward": Moment("forward", 4, rank=0, do=("sleep",)),
    "backward": Moment("backward", 3, do=("sleep",)),
    "step": Moment("step", 4, do=("sleep",)),
    "evaluation": Moment("evaluation", do=("sleep",)),
    "saving": Moment("saving", rank=0, do=("sleep",)),
}
PHASES = some_of(["data", "backward", "saving"], ["forward", "step", "evaluation"])
STOPPED = some_of([0], [1])


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> tuple[Path, dict[str, list[int | None]]]:
    """The runs' folder, and the exit codes of their ranks."""
    folder = tmp_path_factory.mktemp("hung")
    settings = ["training.hang_timeout_seconds=12"]
    asleep = {phase: ASLEEP[phase] for phase in PHASES}
    stopped = {f"stopped-{rank}": Moment("forward", 4, rank, do=("pause", "SIGSTOP")) for rank in STOPPED}
    write_plan(asleep | stopped, folder, small_dataset, settings)
    program = start(["-m", "tests.pipeline.hangs", str(folder)], environment(folder), folder / "output")
    assert program.wait(1800) == 0, (folder / "output").read_text()
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_asleep_for_ever_is_named_and_all_end(
    hung: tuple[Path, dict[str, list[int | None]]], phase: str
) -> None:
    folder, codes = hung
    rank = ASLEEP[phase].rank
    assert codes[phase] == [HANG] * 2, said(folder / phase)
    who = rf"rank {rank} \(host {re.escape(platform.node())}, process \d+\)"
    line = rf"hang: {who} has not moved for \d+ s in {phase}, after step \d;"
    assert re.search(line, said(folder / phase)), said(folder / phase)
    for other in (0, 1):
        stacks = (folder / phase / "logs" / f"rank-{other:05d}.stacks").read_text()
        assert f"hang: rank {rank} " in stacks
        assert ("moments.py" in stacks) is (other == rank)


@pytest.mark.parametrize("rank", STOPPED)
def test_a_stopped_process_does_not_keep_the_other(hung: tuple[Path, dict[str, list[int | None]]], rank: int) -> None:
    folder, codes = hung
    case = folder / f"stopped-{rank}"
    expected: list[int | None] = [HANG, HANG]
    expected[rank] = None
    assert codes[case.name] == expected, said(case)
    line = rf"hang: rank {rank} \(host .*\) gave no sign of life for \d+ s, last seen in forward, after step 1: its"
    assert re.search(line, said(case)), said(case)


@pytest.mark.parametrize("phase", PHASES)
def test_mlflow_knows_why(hung: tuple[Path, dict[str, list[int | None]]], phase: str) -> None:
    spool = hung[0] / phase / "tracking" / "spool.jsonl"
    records = [json.loads(line) for line in spool.read_text().splitlines()]
    assert [item["status"] for item in records if item["kind"] == "status"] == ["RUNNING", "FAILED"]
    tags = {name: value for item in records if item["kind"] == "tags" for name, value in item["values"].items()}
    assert tags["globallocal.status"] == "hung"
    assert f"in {phase}, after step" in tags["globallocal.cause"]


def beat(rank: int, moves: int = 10, still: float = 20, **values: object) -> Beat:
    return Beat(rank, f"n{rank}", 100 + rank, phase="backward", step=7, moves=moves, still_seconds=still, **values)


@pytest.mark.parametrize(
    ("beats", "ranks"),
    [
        ([beat(0, still=9), beat(1, still=9)], []),
        ([beat(0), beat(1)], [0, 1]),
        ([beat(0, waits=True), beat(1)], [1]),
        ([beat(0, waits=True), beat(1, waits=True)], [0, 1]),
        ([beat(0, moves=11), beat(1, moves=9, waits=True), beat(2, moves=11)], [1]),
        ([beat(0, still=0), beat(1, waits=True)], []),  # one rank reads all shards, the other waits for it
        ([beat(0, still=0), beat(1, moves=12)], []),
        ([beat(0), beat(1, moves=12, silent_seconds=19)], [1]),
        ([beat(0), beat(1, ended=True, moves=1, silent_seconds=90)], [0]),
        ([Beat(0, "n0", 1, still_seconds=39), Beat(1, "n1", 2, still_seconds=39)], []),  # before the first step
        ([Beat(0, "n0", 1, still_seconds=41), beat(1, still=0)], [0]),
        ([], []),
    ],
)
def test_suspects(beats: list[Beat], ranks: list[int]) -> None:
    assert [item.rank for item in suspects(beats, 10)] == ranks


def test_one_line_however_many_ranks() -> None:
    line = explain([beat(rank) for rank in range(1000)])
    assert line.startswith(
        "hang: rank 0 (host n0, process 100) has not moved for 20 s in backward, after step 7; rank 1"
    )
    assert line.endswith("; so do 997 more ranks")


def test_whoever_is_late_first_is_the_straggler() -> None:
    usual = StepSeconds((0.1, 1.0, 2.0, 0.1), 3.2)
    late, waiting = StepSeconds((1.1, 1.0, 1.0, 0.1), 3.2), StepSeconds((0.1, 1.0, 2.1, 0.1), 3.3)
    found = find_straggler([usual, waiting, late, usual])
    assert str(found) == "rank 2 is slow in data: 1.10 s per step, others 0.10 s"
    assert find_straggler([usual, usual]) is None


def test_phases_and_the_rest_add_up_to_the_step() -> None:
    metrics = times_per_step([StepSeconds((0.1, 1.0, 2.0, 0.1), 3.4), StepSeconds((0.3, 1.0, 1.8, 0.1), 3.4)])
    assert metrics.pop("time/step_seconds") == pytest.approx(3.4) == pytest.approx(sum(metrics.values()))
    assert metrics["time/data_seconds"] == pytest.approx(0.2)
    assert metrics["time/other_seconds"] == pytest.approx(0.2)

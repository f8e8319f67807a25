"""When a failed job is started again, and on which hosts."""

import json
import re
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.jobs.failures import Blame
from launch.jobs.restarts import Failure, cause_of, fitting_hosts, judge, newest_step, recorded, run_with_restarts
from launch.jobs.session import Ended
from pipeline.tracking.restarts import restart_tags


def failures(*steps: int, code: int = 1) -> list[Failure]:
    return [Failure("a rank failed", step, code) for step in steps]


@pytest.mark.parametrize(
    ("history", "stopped", "restart", "reason"),
    [
        (failures(-1), False, True, "restart 1 of at most 3, before the first checkpoint"),
        (failures(10, 20), False, True, "restart 2 of at most 3, from the checkpoint of step 20"),
        (failures(10, 20, 1_000, 1_200), False, False, "the budget of 3 restarts is spent (--max-restarts)"),
        (failures(10, 20, 20, 20), False, False, "crash loop: 3 failures in a row from the checkpoint of step 20; not"),
        (failures(-1, -1, -1), False, False, "crash loop: 3 failures in a row before the first checkpoint; not"),
        (failures(5, 5), False, True, "restart 2 of at most 3"),
        (failures(5, code=2), False, False, "a mistake to fix, said above"),
        (failures(5, code=75), True, False, "stopped on request (exit code 75)"),
        (failures(5, code=75), False, True, "started again from the checkpoint of step 5"),
        ([*failures(1, 2, 3, 4, 5, 6, code=75), *failures(7)], False, True, "restart 1 of at most 3"),
        (failures(5, 5, 5, code=75), False, False, "crash loop: 3 failures in a row from the checkpoint of step 5"),
    ],
)
def test_verdicts(history: list[Failure], stopped: bool, restart: bool, reason: str) -> None:
    verdict = judge(history, 3, stopped)
    assert verdict.restart is restart
    assert verdict.reason.startswith(reason)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=30), st.integers(0, 5))
def test_a_job_is_never_started_more_often_than_the_budget_allows(steps: list[int], budget: int) -> None:
    if len(steps) > budget:
        assert not judge(failures(*steps), budget, False).restart


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (Ended(1), "a rank failed (exit code 1)"),
        (Ended(137), "ended by signal 9"),
        (Ended(75), "preempted: the ranks were told to stop, and left in order"),
        (Ended(76), "a rank hung (exit code 76)"),
        (Ended(2, blames=(Blame("n1", "node n1 failed (exit code 2)", False),)), "refused by the ranks (exit code 2)"),
        (
            Ended(255, blames=(Blame("n0", "rank 0 on n0: reset", False), Blame("n1", "node n1 failed", True))),
            "node n1 failed",
        ),
        (Ended(1, blames=(Blame("n0", "rank 0 on n0: reset", False),)), "rank 0 on n0: reset"),
        (
            Ended(75, signal.SIGTERM, (Blame("n1", "node n1 failed", True),)),
            "preempted: the ranks were told to stop, and left in order",
        ),
    ],
)
def test_causes(ended: Ended, cause: str) -> None:
    assert cause_of(ended) == cause


def test_newest_step_counts_published_checkpoints_only(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    for name, whole in (("step-00000010", True), ("step-00000020", True), ("step-00000030", False)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if whole:
            (tmp_path / "checkpoints" / name / "integrity.json").write_text("{}")
    assert newest_step(tmp_path) == 20


def test_a_job_that_progresses_is_started_again_until_it_is_done(tmp_path: Path) -> None:
    codes = [1, 137, 0]
    said: list[str] = []

    def start(history: list[Failure]) -> Ended:
        step = 10 * (len(history) + 1)
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "integrity.json").write_text("{}")
        return Ended(codes[len(history)])

    assert run_with_restarts(start, tmp_path, max_restarts=3, pause_seconds=0, say=said.append) == 0
    lines = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [(line["cause"], line["step"], line["restart"]) for line in lines] == [
        ("a rank failed (exit code 1)", 10, True),
        ("ended by signal 9", 20, True),
    ]
    assert said[1] == "globallocal: ended by signal 9; restart 2 of at most 3, from the checkpoint of step 20"
    assert recorded(tmp_path, "") == [
        Failure("a rank failed (exit code 1)", 10, 1),
        Failure("ended by signal 9", 20, 137),
    ]
    assert recorded(tmp_path, "another job") == []
    tags = restart_tags(tmp_path)
    assert tags["globallocal.restarts"] == "2"
    assert re.fullmatch(
        r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ended by signal 9; restart 2 of at most 3, from the checkpoint of step 20",
        tags["globallocal.restart.002"],
    )


def test_a_run_that_was_never_started_again_has_no_restart_tags(tmp_path: Path) -> None:
    assert restart_tags(tmp_path) == {}


def test_a_crash_loop_ends_early_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    assert run_with_restarts(lambda _: Ended(1), tmp_path, 10, pause_seconds=0, say=said.append) == 1
    assert len(said) == 3
    assert "crash loop: 3 failures in a row before the first checkpoint" in said[-1]


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=8),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_fitting_hosts_are_the_most_that_share_the_batch(slots: list[int], batch: int, micro: int, least: int) -> None:
    hosts = {f"n{i}": count for i, count in enumerate(slots)}
    chosen = fitting_hosts(hosts, [batch], micro, least)

    def fits(count: int) -> bool:
        return batch % (micro * sum(slots[:count])) == 0

    if chosen:
        assert list(chosen) == list(hosts)[: len(chosen)]
        assert len(chosen) >= least
        assert fits(len(chosen))
    assert not any(fits(count) for count in range(max(len(chosen) + 1, least), len(slots) + 1))

"""Decides whether a job that has failed is started again, and on which hosts."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from launch.jobs.failures import first_cause
from launch.jobs.session import Ended
from pipeline.exit_codes import HANG, PREEMPTED, USER_ERROR
from pipeline.tracking.restarts import RESTARTS_FILE, read_restarts

SAME_STEP_FAILURES = 3
"""As many failures without a new checkpoint in between are a crash loop."""


@dataclass(frozen=True)
class Failure:
    """One end of a job that was no success.

    Attributes:
        cause: one line, for the log, for MLflow and for the person.
        step: of the newest checkpoint at that time, −1 without one.
        node: where it began, if that is known.
    """

    cause: str
    step: int
    code: int
    node: str = ""


@dataclass(frozen=True)
class Verdict:
    restart: bool
    reason: str


def judge(failures: list[Failure], max_restarts: int, stopped: bool) -> Verdict:
    """Whether the job is started again after its latest failure; the reason is one line.

    Preemptions (all was saved) are no failures of the job: they do not count against `max_restarts`, but a job that
    makes no progress between them is a crash loop like any other.
    """
    last = failures[-1]
    if stopped:
        return Verdict(False, f"stopped on request (exit code {last.code}); start it again to go on")
    if last.code == USER_ERROR:
        return Verdict(False, "a mistake to fix, said above; a restart would meet it again")
    latest = failures[-SAME_STEP_FAILURES:]
    if len(latest) == SAME_STEP_FAILURES and all(failure.step == last.step for failure in latest):
        return Verdict(False, f"crash loop: {SAME_STEP_FAILURES} failures in a row {_at(last.step)}; not started again")
    spent = sum(failure.code != PREEMPTED for failure in failures)
    if spent > max_restarts == 0:
        return Verdict(False, "not started again by itself")
    if spent > max_restarts:
        return Verdict(False, f"the budget of {max_restarts} restarts is spent (--max-restarts)")
    if last.code == PREEMPTED:
        return Verdict(True, f"started again {_at(last.step)}")
    return Verdict(True, f"restart {spent} of at most {max_restarts}, {_at(last.step)}")


def _at(step: int) -> str:
    return "before the first checkpoint" if step < 0 else f"from the checkpoint of step {step:,}"


def newest_step(run_folder: Path) -> int:
    """Step of the newest checkpoint that was published whole; −1 without one. The ranks verify it at the start."""
    steps = [
        int(path.parent.name.removeprefix("step-"))
        for path in (run_folder / "checkpoints").glob("step-*/integrity.json")
        if path.parent.name.removeprefix("step-").isdigit()
    ]
    return max(steps, default=-1)


def cause_of(ended: Ended) -> str:
    """One line that says how a job ended."""
    if ended.code == PREEMPTED:
        return "preempted: the ranks were told to stop, and left in order"
    if ended.code == USER_ERROR:
        return f"refused by the ranks (exit code {USER_ERROR})"
    cause = first_cause(ended.blames)
    if cause:
        return cause.what
    if ended.code == HANG:
        return f"a rank hung (exit code {HANG})"
    if ended.code > 128:
        return f"ended by signal {ended.code - 128}"
    return f"a rank failed (exit code {ended.code})"


def judge_and_record(
    failures: list[Failure],
    run_folder: Path,
    max_restarts: int,
    stopped: bool,
    job: str = "",
    say: Callable[[str], None] = print,
) -> Verdict:
    """Judge the latest end of a job, write it down and say it."""
    verdict = judge(failures, max_restarts, stopped)
    record(run_folder, failures[-1], verdict, job)
    say(f"globallocal: {failures[-1].cause}; {verdict.reason}")
    return verdict


def run_with_restarts(
    start: Callable[[list[Failure]], Ended],
    run_folder: Path,
    max_restarts: int,
    pause_seconds: float = 2.0,
    say: Callable[[str], None] = print,
) -> int:
    """Start a job until it is done or `judge` says no; returns its exit code.

    Args:
        start: gets all failures so far.
        pause_seconds: before the next start, where the last one came no further than the one before.
    """
    failures: list[Failure] = []
    while True:
        ended = start(failures)
        if ended.code == 0:
            return 0
        failures.append(failure_of(ended, run_folder))
        verdict = judge_and_record(failures, run_folder, max_restarts, ended.stopped_by is not None, say=say)
        if not verdict.restart:
            return ended.code
        if len(failures) > 1 and failures[-1].step == failures[-2].step:
            time.sleep(pause_seconds)


def failure_of(ended: Ended, run_folder: Path) -> Failure:
    cause = first_cause(ended.blames)
    return Failure(cause_of(ended), newest_step(run_folder), ended.code, cause.node if cause else "")


def record(run_folder: Path, failure: Failure, verdict: Verdict, job: str = "") -> None:
    """A line of `restarts.jsonl` in the run folder, which the ranks hand on to MLflow at their next start."""
    entry = {"time": time.time(), "job": job, **asdict(failure), **asdict(verdict)}
    path = run_folder / RESTARTS_FILE
    try:
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with open(path, "a") as file:
            file.write("\n" * torn + json.dumps(entry) + "\n")
    except OSError as error:
        print(f"{path}: {error.strerror}; this end of the job is not recorded", flush=True)


def recorded(run_folder: Path, job: str) -> list[Failure]:
    """The failures of a job that were recorded so far."""
    names = [item.name for item in fields(Failure)]
    entries = [entry for entry in read_restarts(run_folder) if entry.get("job") == job]
    return [Failure(**{name: entry[name] for name in names}) for entry in entries if entry.keys() >= set(names)]


def fitting_hosts(
    hosts: Mapping[str, int], batch_sizes: Sequence[int], micro_batch_size: int, min_nodes: int
) -> dict[str, int]:
    """The most hosts, in their order, whose ranks share every global batch evenly; empty where no number does."""
    for count in range(len(hosts), max(min_nodes, 1) - 1, -1):
        chosen = dict(list(hosts.items())[:count])
        if math.gcd(*batch_sizes) % (micro_batch_size * sum(chosen.values())) == 0:
            return chosen
    return {}

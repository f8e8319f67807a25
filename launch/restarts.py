"""When a job that has failed is started again, and on which hosts."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.processes import Ended

USER_ERROR_EXIT_CODE = 2
PREEMPTED_EXIT_CODE = 75
SAME_STEP_FAILURES = 3
"""As many failures without a new checkpoint in between are a crash loop."""


@dataclass(frozen=True)
class Failure:
    """One end of a job that was no success.

    Attributes:
        cause: one line, for the log, for MLflow and for the person.
        step: of the newest checkpoint at that time, −1 without one.
    """

    cause: str
    step: int
    code: int


@dataclass(frozen=True)
class Verdict:
    restart: bool
    reason: str


def judge(failures: list[Failure], max_restarts: int, stopped: bool) -> Verdict:
    """Whether the job is started again after its latest failure; the reason is one line."""
    last = failures[-1]
    if stopped:
        return Verdict(False, f"stopped on request (exit code {last.code}); start it again to go on")
    if last.code == USER_ERROR_EXIT_CODE:
        return Verdict(False, "a mistake to fix, said above; a restart would meet it again")
    same = [failure for failure in failures if failure.step == last.step]
    if len(same) >= SAME_STEP_FAILURES and failures[-SAME_STEP_FAILURES:] == same[-SAME_STEP_FAILURES:]:
        return Verdict(False, f"crash loop: {SAME_STEP_FAILURES} failures in a row {_at(last.step)}; not started again")
    if len(failures) > max_restarts:
        return Verdict(False, f"the budget of {max_restarts} restarts is spent (--max-restarts)")
    return Verdict(True, f"restart {len(failures)} of at most {max_restarts}, {_at(last.step)}")


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
    if ended.code == PREEMPTED_EXIT_CODE:
        return "preempted: the ranks were told to stop, and all is saved"
    if ended.failed_nodes:
        return f"node {ended.failed_nodes[0]} failed (exit code {ended.code})"
    if ended.code > 128:
        return f"ended by signal {ended.code - 128}"
    return f"a rank failed (exit code {ended.code})"


def run_with_restarts(
    start: Callable[[list[Failure]], Ended],
    run_folder: Path,
    max_restarts: int,
    pause_seconds: float = 5.0,
    say: Callable[[str], None] = print,
) -> int:
    """Start a job until it is done or `judge` says no; returns its exit code.

    Every failure is a line of `restarts.jsonl` in the run folder. `start` gets all failures so far.
    """
    failures: list[Failure] = []
    while True:
        ended = start(failures)
        if ended.code == 0:
            return 0
        failures.append(Failure(cause_of(ended), newest_step(run_folder), ended.code))
        verdict = judge(failures, max_restarts, ended.stopped_by is not None)
        record(run_folder, failures[-1], verdict)
        say(f"globallocal: {failures[-1].cause}; {verdict.reason}")
        if not verdict.restart:
            return ended.code
        time.sleep(pause_seconds)


def record(run_folder: Path, failure: Failure, verdict: Verdict) -> None:
    entry = {"time": time.time(), **asdict(failure), **asdict(verdict)}
    with open(run_folder / "restarts.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def fitting_hosts(
    hosts: Mapping[str, int], global_batch_size: int, micro_batch_size: int, min_nodes: int
) -> dict[str, int]:
    """The most hosts, in their order, whose ranks share the global batch evenly; empty where no number of them does."""
    for count in range(len(hosts), max(min_nodes, 1) - 1, -1):
        chosen = dict(list(hosts.items())[:count])
        if global_batch_size % (micro_batch_size * sum(chosen.values())) == 0:
            return chosen
    return {}

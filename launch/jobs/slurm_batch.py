"""The program on the first node of a Slurm job: `python -m launch.jobs.slurm_batch --run-folder RUN … -- srun …`.

It checks that all nodes run the same, starts the ranks by the command after `--`, and when that has ended decides,
as `restarts.judge` does everywhere, whether the job is put back into the queue.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from launch.hosts import node
from launch.hosts.ssh import differences
from launch.jobs.command import cpu_environment
from launch.jobs.environment import ENVIRONMENT
from launch.jobs.over_hosts import master_address
from launch.jobs.restarts import Failure, failure_of, judge_and_record, newest_step, recorded
from launch.jobs.session import Ended, Launch, run_session
from launch.jobs.slurm import slurm
from pipeline.exit_codes import PREEMPTED
from pipeline.settings.section import counted

FACTS_SECONDS = 120
KILLED_BY_NOTICE = 128 + signal.SIGUSR1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--grace-seconds", type=float, required=True)
    parser.add_argument("--master-addr", default="")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    say = partial(print, flush=True)
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
    failures = recorded(options.run_folder, job)
    unseen = unseen_end(failures, options.run_folder)
    if unseen:
        failures.append(unseen)
        verdict = judge_and_record(failures, options.run_folder, options.max_restarts, False, job, say)
        if not verdict.restart:
            return end(job, unseen.code, options.run_folder)
    ended = start(options.command, options.master_addr, options.grace_seconds)
    if ended.code == 0:
        return end(job, 0, options.run_folder)
    stopped = ended.stopped_by not in (None, signal.SIGUSR1)
    failures.append(failure_of(ended, options.run_folder))
    verdict = judge_and_record(failures, options.run_folder, options.max_restarts, stopped, job, say)
    return queue_again(failures) if verdict.restart else end(job, ended.code, options.run_folder)


def unseen_end(failures: Sequence[Failure], run_folder: Path) -> Failure | None:
    """An end of this job that nobody could write down: Slurm itself has queued it again."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) <= len(failures):
        return None
    return Failure("a node failed, or the job was preempted: Slurm queued it again", newest_step(run_folder), 1)


def start(command: Sequence[str], address: str, grace_seconds: float) -> Ended:
    """Run the ranks once, to their end; a node that differs from the others ends it before they start."""
    noticed: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: noticed.append(number))
    try:
        facts = nodes_facts()
        here = facts[next(iter(facts))]
        ranks = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        problems = differences(facts, dict.fromkeys(facts, ranks))
        if problems:
            raise UserError(problems)
        added = {
            "MASTER_ADDR": address or master_address(platform.node(), node.addresses()),
            "MASTER_PORT": str(node.free_port()),
            "SLURM_EXPORT_ENV": "ALL",  # `sbatch --export=…` would keep srun from handing these on
            **({} if here["devices"] else cpu_environment(ranks)),
        }
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", flush=True)
        return Ended(error.exit_code)
    if "SLURM_CPUS_PER_TASK" in os.environ:  # srun no longer takes it from the job by itself
        added["SRUN_CPUS_PER_TASK"] = os.environ["SLURM_CPUS_PER_TASK"]
    first = f"{added['MASTER_ADDR']}:{added['MASTER_PORT']}"
    print(
        f"nodes: {', '.join(facts)} × {counted(ranks, 'rank')}, rank 0 at {first}",
        flush=True,
    )
    if noticed:  # the time was up before there was anything to save
        return Ended(PREEMPTED, signal.SIGUSR1)
    ended = run_session(
        Launch(command, {**os.environ, **added}, grace_seconds=grace_seconds, stop_signal=signal.SIGUSR1)
    )
    if ended.code:
        end_steps(os.environ["SLURM_JOB_ID"])
    if ended.stopped_by == signal.SIGUSR1 and ended.code == KILLED_BY_NOTICE:
        return Ended(PREEMPTED, ended.stopped_by)  # likewise: the ranks did not listen yet
    return ended


def end_steps(number: str) -> None:
    """Kill the ranks that a dead srun has left on the nodes: Slurm would wait for them for its `KillWait`."""
    for step in slurm("squeue", "--steps", "--noheader", "--jobs", number, "--format", "%i").split():
        if step.rpartition(".")[2].isdigit():  # not the batch step, which we are
            slurm("scancel", "--signal=KILL", step)


def nodes_facts() -> dict[str, dict[str, Any]]:
    """The facts about each node of the job, by its Slurm name, the first one first.

    Raises:
        UserError: a node does not answer.
    """
    ask = f'echo "$SLURMD_NODENAME $({shlex.join([sys.executable, node.__file__, "facts", "0"])})"'
    count = int(os.environ["SLURM_NNODES"])
    command = ["srun", "--ntasks-per-node=1", f"--ntasks={count}", "bash", "-c", ask]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=FACTS_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"the nodes of the job do not answer within {FACTS_SECONDS} s; see `sinfo`") from None
    facts = {}
    for line in done.stdout.splitlines():
        name, _, text = line.partition(" ")
        with suppress(json.JSONDecodeError):
            facts[name] = json.loads(text)
    if len(facts) < count:
        raise UserError([f"{len(facts)} of {count} nodes can run this project", *done.stderr.splitlines()])
    first = os.environ["SLURMD_NODENAME"]
    return {name: facts[name] for name in sorted(facts, key=lambda name: (name != first, name))}


def queue_again(failures: Sequence[Failure]) -> int:
    """Put this job back into the queue; the next of an array needs nothing.

    A node that was named by two failures in a row is left out from then on, where there are others.
    """
    code = failures[-1].code
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return code
    number = os.environ["SLURM_JOB_ID"]
    state = slurm("squeue", "--noheader", "--jobs", number, "--format", "%T %r").strip()
    if "RUNNING" not in state and "TimeLimit" not in state:  # cancelled meanwhile, say
        print(f"globallocal: not queued again, since Slurm has the job as {state or 'ended'}", flush=True)
        return code
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm ends this script for the requeue
    done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True)
    if done.returncode:
        print(f"globallocal: {done.stderr.strip()}; use `--turns N` where requeue is forbidden", flush=True)
        return code
    nodes = [failure.node for failure in failures[-2:]]
    if len(nodes) == 2 and nodes[0] and nodes[0] == nodes[1] and spare_nodes():
        exclude(number, nodes[0])
    return code


def spare_nodes() -> bool:
    """Whether the partition has more nodes that work than this job takes."""
    partition = os.environ["SLURM_JOB_PARTITION"]
    states = "idle,allocated,mixed,completing"
    counts = slurm("sinfo", "--noheader", "--partition", partition, "--states", states, "--format", "%D").split()
    return sum(map(int, counts)) > int(os.environ["SLURM_NNODES"])


def exclude(number: str, name: str) -> None:
    """Leave a node out of this job's next starts; Slurm takes that only of a job that waits."""
    for _ in range(10):
        if subprocess.run(["scontrol", "update", f"JobId={number}", f"ExcNodeList={name}"]).returncode == 0:
            undo = f"`scontrol update JobId={number} ExcNodeList=` takes it back"
            print(f"globallocal: {name} failed twice in a row and is left out from now on; {undo}", flush=True)
            return
        time.sleep(1)


def end(job: str, code: int, run_folder: Path) -> int:
    """The end of a job that is not started again: what `closing` does, with the ranks' own environment."""
    cancel_rest(job)
    script = run_folder / "launch" / ENVIRONMENT
    program = [sys.executable, "-m", "launch.jobs.closing", str(run_folder), str(code)]
    subprocess.run(
        ["bash", "-c", '[ -e "$0" ] && source "$0"; exec "$@"', str(script), *program],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},  # the script asks for it
        stdin=subprocess.DEVNULL,
    )
    return code


def cancel_rest(job: str) -> None:
    """Cancel what is left of an array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        slurm("scancel", "--state=PENDING", job)


if __name__ == "__main__":
    sys.exit(main())

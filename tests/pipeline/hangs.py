"""`python -m tests.pipeline.hangs FOLDER`: training runs side by side, in each of which a rank stops moving.

All ranks are forked from one process that has imported everything; each case is a job of its own.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.hosts.node import free_port
from tests.pipeline.moments import Moment, happening
from tests.pipeline.ranks import Run, tiny_overrides
from tests.pipeline.tracking_fixtures import empty_store

RANKS = 2
AT_ONCE = 4
LIMIT_SECONDS = 400.0


def write_plan(cases: dict[str, Moment], folder: Path, dataset: Path, settings: list[str]) -> None:
    plan = {}
    for name, moment in cases.items():
        own = f"tracking.uri=sqlite:///{folder}/{name}.db"
        shutil.copy(empty_store(), folder / f"{name}.db")
        overrides = tiny_overrides(Run(name, [*settings, own]), folder, dataset)
        plan[name] = {"moment": asdict(moment), "overrides": overrides}
    (folder / "hangs.json").write_text(json.dumps(plan))


def main(folder: Path) -> None:
    import pipeline.train  # noqa: F401  before the forks

    plan = json.loads((folder / "hangs.json").read_text())
    results: dict[str, list[int | None]] = {}
    names = list(plan)
    for first in range(0, len(names), AT_ONCE):
        jobs = {name: start(plan[name], folder / name) for name in names[first : first + AT_ONCE]}
        results |= {name: end(job) for name, job in jobs.items()}
    (folder / "results.json").write_text(json.dumps(results))


def start(case: dict[str, Any], folder: Path) -> list[int]:
    """Process ids of the ranks."""
    folder.mkdir()
    port = free_port()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                code = train(case, folder, rank, port)
            except BaseException:
                code = 1
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(code)
        pids.append(pid)
    return pids


def train(case: dict[str, Any], folder: Path, rank: int, port: int) -> int:
    from pipeline.train import main

    with open(folder / f"rank-{rank}.out", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with happening(Moment(**case["moment"]), rank):
        return main(["--config", "launch/runs/quickstart.yaml", *case["overrides"]])


def end(pids: list[int]) -> list[int | None]:
    """Exit codes, None of a rank that had to be killed, as a launcher would, some time after the others had ended.

    One under SIGSTOP will not end: it is killed as soon as the others have.
    """
    codes: dict[int, int | None] = {}
    stopped: set[int] = set()
    deadline = time.monotonic() + LIMIT_SECONDS
    while codes.keys() | stopped != set(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + 40)
        time.sleep(0.1)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[pid] = None
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

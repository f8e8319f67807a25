"""A job is ended whole, whatever happens to its launcher: DeepSpeed's own, over two ranks of a small program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.pipeline.ranks import without_mlflow
from tests.variants import some_of

RANK = """
import os, signal, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
def stop(*_):
    with open(f"{folder}/stopped-{os.environ['RANK']}", "a") as file:
        file.write("x")
    time.sleep(1)  # it saves
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/ready-{os.environ['RANK']}", "w").close()
mode = sys.argv[-1]
os.write(1, b"tracking at http://bob:SECRET@host:5000/path?token=HIDDEN\\n")  # in one piece: two ranks write
if mode == "raise" and os.environ["RANK"] == "1":
    raise RuntimeError("rank 1 fails")
time.sleep(0 if mode == "done" else 600)
"""

CALLER = """
import os, signal, sys
from pathlib import Path
from launch.hosts.node import free_port
from launch.jobs import session as processes
from launch.jobs.command import Job
folder, mode, grace = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
processes.TRAIN_PROGRAM = folder / "rank.py"
bin = Path(sys.executable).parent
job = Job([str(bin / "deepspeed"), "--hostfile=none", "--log_level=critical", "--num_accelerators=2",
           f"--master_port={free_port()}", "--no_local_rank", str(folder / "rank.py"), mode], {"DS_ACCELERATOR": "cpu"})
ended = processes.run_session(processes.Launch(job.command, job.whole_environment(), folder / "log", grace))
print("ended", ended.code, ended.stopped_by)
sys.exit(ended.code)
"""


class Running:
    """A process that runs a job by `run_session`."""

    def __init__(self, folder: Path, mode: str, grace_seconds: float) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        # The guard is a process of its own and must know the same ranks.
        (folder / "caller.py").write_text(CALLER)
        self.process = psutil.Popen(
            [sys.executable, str(folder / "caller.py"), str(folder), mode, str(grace_seconds)],
            env={**os.environ, "PYTHONPATH": without_mlflow(folder / "python")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + 400
        while not all((self.folder / f"ready-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.05)

    def launcher(self) -> psutil.Process:
        return next(p for p in self.process.children(recursive=True) if "deepspeed.launcher.launch" in p.cmdline())

    def living(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if any(str(self.folder) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(words))
        return found

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=400)
        return self.process.returncode, output


def stops(folder: Path) -> list[str]:
    return [(folder / f"stopped-{rank}").read_text() for rank in (0, 1) if (folder / f"stopped-{rank}").exists()]


def test_a_job_ends_and_a_password_that_ranks_print_comes_neither_into_the_log_nor_onto_the_terminal(
    tmp_path: Path,
) -> None:
    job = Running(tmp_path, "done", 60)
    code, said = job.finish()
    assert code == 0, said
    assert job.living() == []
    log = (tmp_path / "log").read_text()
    assert log.count("http://***@host:5000/path?token=***") == 2
    assert "SECRET" not in log + said
    assert "HIDDEN" not in log + said


def test_a_rank_that_raises_ends_the_job_with_its_code(tmp_path: Path) -> None:
    job = Running(tmp_path, "raise", 60)
    code, output = job.finish()
    assert code == 1
    assert "rank 1 fails" in output
    assert "rank 1 fails" in (tmp_path / "log").read_text()
    assert job.living() == []


@pytest.mark.parametrize("number", some_of([signal.SIGINT], [signal.SIGTERM]))  # test_stop.py sends SIGTERM
def test_a_stop_reaches_every_rank_once_and_waits_for_it(tmp_path: Path, number: signal.Signals) -> None:
    job = Running(tmp_path, "sleep", 60)
    job.wait_for_ranks()
    job.process.send_signal(number)
    code, output = job.finish()
    assert code == 75, output
    assert f"{number.name}: the ranks save and stop (at most 60 s)" in output
    # The launcher passes on a second signal when it sees the first rank leave: at most one more each.
    assert len(stops(tmp_path)) == 2
    assert job.living() == []


def test_a_killed_launcher_is_no_success_and_leaves_nobody(tmp_path: Path) -> None:
    job = Running(tmp_path, "sleep", 60)
    job.wait_for_ranks()
    job.launcher().kill()
    code, output = job.finish()
    assert code == 1, output
    assert job.living() == []


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    job = Running(tmp_path, "sleep", 600)
    job.wait_for_ranks()
    for rank in [p for p in psutil.process_iter() if str(tmp_path / "rank.py") in safe_words(p)[:3]]:
        rank.suspend()  # it will not react to the first
    job.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    job.process.send_signal(signal.SIGTERM)
    code, output = job.finish()
    assert code == 128 + signal.SIGKILL, output
    assert job.living() == []


def safe_words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_vanished_caller_leaves_nobody(tmp_path: Path) -> None:
    job = Running(tmp_path, "sleep", 1)
    job.wait_for_ranks()
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    deadline = time.monotonic() + 60
    while job.living():
        assert time.monotonic() < deadline, job.living()
        time.sleep(0.2)

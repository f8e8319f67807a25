"""A standby: two ranks of a small program, which have been started before they are needed."""

import os
import sys
import time
from pathlib import Path

from launch.jobs import warm_runner
from launch.jobs.session import Launch, run_session, session_members
from launch.jobs.standby import Standby
from pipeline.distributed.turn import GO, STANDBY_VARIABLE
from tests.conftest import ROOT

RANKS = """
import os
from pathlib import Path
from pipeline.distributed.turn import take_turn
os.fork()
clock = take_turn()
os.write(1, " ".join(["start   ", *clock.start_seconds, "\\n"]).encode())  # in one piece: two ranks write
"""


def standby(log: Path) -> Standby:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), STANDBY_VARIABLE: "1"}
    return Standby.of(Launch([sys.executable, "-c", RANKS], environment, log, echo=False))


def wait_for_nobody(session: int) -> None:
    deadline = time.monotonic() + 60
    while session_members(session):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_waits_for_its_turn_and_every_rank_then_starts(tmp_path: Path) -> None:
    waiting = standby(tmp_path / "log")
    time.sleep(1)
    assert waiting.process.poll() is None
    assert waiting.go(GO * 2)
    assert run_session(waiting.launch, waiting.process).code == 0
    assert (tmp_path / "log").read_text().splitlines() == ["start    standby "] * 2


def test_without_its_launcher_it_leaves(tmp_path: Path) -> None:
    waiting = standby(tmp_path / "log")
    assert waiting.process.stdin is not None
    assert waiting.process.stdout is not None
    waiting.process.stdin.close()
    assert waiting.process.wait(60) == 0
    assert waiting.process.stdout.read() == b""
    wait_for_nobody(waiting.process.pid)


def test_one_that_is_not_needed_or_has_died_is_gone(tmp_path: Path) -> None:
    unneeded, dead = standby(tmp_path / "log"), standby(tmp_path / "log")
    unneeded.end()
    dead.process.kill()
    dead.process.wait()
    assert not dead.go(GO * 2)
    assert not session_members(unneeded.process.pid)
    assert not session_members(dead.process.pid)


def test_deepspeeds_runner_waits_for_its_arguments_and_without_them_leaves(tmp_path: Path) -> None:
    launch = Launch(warm_runner.COMMAND, {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "log", echo=False)
    waiting, left = Standby.of(launch), Standby.of(launch)
    assert left.process.stdin is not None
    left.process.stdin.close()
    assert waiting.go(warm_runner.order(["deepspeed", "--help"]))
    assert run_session(launch, waiting.process).code == 0
    assert "DeepSpeed runner" in (tmp_path / "log").read_text()
    assert left.process.wait(60) == 0
    left.end()

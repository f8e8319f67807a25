"""What a person sees of a job, on a terminal and elsewhere."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.jobs.screen import CHATTER, STEP, style
from launch.jobs.session import Launch, run_session

LINES = """\
run     made in runs/made
DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully
[2026-11-29 06:00:00,000] [INFO] [launch.py:178:main] nnodes=1
[2026-11-29 06:00:00,000] [WARNING] [engine.py:17:note] of no interest
step 10/1,300  loss 7.9773  lr 1.50e-03  4,100 tokens/s (2,050 per device)  left 32 s
warning: step 11: spike: loss 9 is 40 robust deviations above the median
step 20/1,300  loss 7.0300  lr 3.00e-03  4,200 tokens/s (2,100 per device)  left 19 s
step 20  held-out loss 6.6031
sample: '[red]not markup[/red] ü'
"""
PROGRAM = f"""
from pathlib import Path
import pytest

from launch.jobs.screen import CHATTER, STEP, style
from launch.jobs.session import Launch, run_session
run_session(Launch(["printf", "%s", {LINES!r}], {{"PATH": "/usr/bin:/bin"}}, Path("launch.log")))
"""
SHOWN = [line for line in LINES.splitlines() if not line.startswith(("DeepSpeed", "["))]


def test_elsewhere_lines_are_copied_but_for_deepspeeds_chatter(tmp_path: Path, capfd) -> None:
    run_session(Launch(["printf", "%s", LINES], {"PATH": os.environ["PATH"]}, tmp_path / "launch.log"))
    assert capfd.readouterr().out.splitlines() == SHOWN
    assert (tmp_path / "launch.log").read_text() == LINES


@pytest.mark.parametrize("host", ["", "node-1.cluster: ", "0: "])
def test_lines_of_other_hosts_look_the_same(host: str) -> None:
    assert STEP.match(f"{host}step 10/1,300  loss 7.9773")
    assert CHATTER.search(f"{host}DeepSpeed deepspeed.ops.comm built successfully".encode())
    assert style(f"{host}warning: step 11: spike") == "yellow"
    assert style(f"{host}critical: globallocal: rank 1 on a failed in forward") == "bold red"
    assert style(f"{host}run     made in runs/made") == ""


def test_on_a_terminal_steps_are_one_live_line_and_warnings_stand_out(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as job:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            seen += part
    os.close(ours)
    assert job.returncode == 0
    text = seen.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "step 20/1,300 ━" in plain
    assert "loss 7.0300  4,200 tokens/s  left 19 s" in plain  # also where the line is cut
    assert "step 10/1,300  loss" not in plain  # on the live line alone
    assert "\x1b[33mwarning: step 11: spike" in text
    assert "sample: '[red]not markup[/red] ü'" in plain
    assert "DeepSpeed deepspeed" not in plain
    assert "of no interest" not in plain
    assert (tmp_path / "launch.log").read_text() == LINES

"""Ctrl-C to a command that starts no job: one line, exit code 130, at once, nothing left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

WAITING = """
import sys, time
import launch.cli as cli
from launch import interrupt

@cli.app.command()
def {name}() -> None:
    print("working", flush=True)
    {work}

sys.exit(cli.main([{name!r}]))
"""


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("waiting", "time.sleep(60)"),  # Python hears the signal at once
        (
            "computing",
            "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
        ),  # one call in C, which hears nothing
        ("waited", "import subprocess; subprocess.run(['sleep', '60'])"),
    ],
)
def test_one_line_and_130_whatever_it_is_doing(name: str, work: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(name=name, work=work)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "working\n"
    time.sleep(0.2)
    children = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGINT)
    said = program.communicate(timeout=30)[1]
    assert program.returncode == 130, said
    assert said == "interrupted: nothing was changed; the same command begins anew\n"
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m launch estimate --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert "Traceback" not in done.stderr


def test_a_file_without_rights_is_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "verify", str(tmp_path / "absent")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

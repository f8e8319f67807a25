"""What a test run leaves behind is named, and makes it fail."""

import os
import subprocess
import sys

import pytest

from tests.alone import UNSHARE
from tests.conftest import ROOT

LEAVES = "sleep 999 & touch /dev/shm/forgotten"


def test_a_process_and_shared_memory_left_behind_are_named() -> None:
    if os.geteuid() != 0 or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are missing; run the tests as root, who may make them (unshare of util-linux)")
    command = [sys.executable, "-m", "tests.alone", "sh", "-c", LEAVES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert said[0] == "left behind:"
    assert said[1].endswith(": sleep 999")
    assert said[2:] == ["  /dev/shm/forgotten"]

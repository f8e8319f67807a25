"""Kernels in Triton's interpreter, which is chosen for a whole process: so in one of their own."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FILES = [
    "interpreted_convolution.py",
    "interpreted_router_and_loss.py",
    "test_kernels_delta.py",
    "test_kernels_summary.py",
]


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is missing; install it with `pip install 'triton>=3.5'` (Linux)")
    files = [f"tests/model/{name}" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]

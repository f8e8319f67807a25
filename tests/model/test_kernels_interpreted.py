"""Kernels in Triton's interpreter, which is chosen for a whole process: so in one of their own."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("kernels", ["convolution", "router_and_loss"])
def test_kernels_in_the_interpreter(kernels):
    pytest.importorskip("triton", reason="Triton is missing; install it with `pip install 'triton>=3.5'` (Linux)")
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", f"tests/model/interpreted_{kernels}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]

"""The kernels on a GPU, in `make gpu`: right, the same twice, and how long each takes beside what was reckoned."""

import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model import (
    ops_convolution_globallocal,
    ops_delta_globallocal,
    ops_loss_globallocal,
    ops_router_globallocal,
    ops_summary_globallocal,
    reference,
)
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks import reckoned
from tests.benchmarks.gpu_passes import DEVICE, Sizes, median_seconds
from tests.conftest import ROOT

OPERATIONS = (
    *(ops_convolution_globallocal, ops_delta_globallocal, ops_loss_globallocal),
    *(ops_router_globallocal, ops_summary_globallocal),
)
TESTS = ["tests/model/test_kernels_delta.py", "tests/model/test_kernels_summary.py"]  # they run where the card is
COMPARED = (2, 200)  # sequences, length: beside the tiles' sizes


def kernels(sizes: Sizes) -> dict[str, Any]:
    """Of every part that has kernels: forward and backward by them and plain, and how far they are from float64."""
    return {part.name: measured(part, sizes) for part in reckoned.kernels()}


def measured(part: reckoned.Part, sizes: Sizes) -> dict[str, Any]:
    (step,) = part.steps
    with torch.device(DEVICE):
        found, again, exact = (
            reckoned.prepared(step, COMPARED, dtype)() for dtype in (None, None, torch.float64)
        )  # float64 has no kernels
        run = reckoned.prepared(step, (sizes.micro_batch, sizes.sequence_length))
        seconds = median_seconds({"kernels": run})
        with ExitStack() as stack:
            for module in OPERATIONS:
                stack.enter_context(patch.object(module, "has_kernels", lambda x: False))
            seconds |= median_seconds({"plain": run})
    return {
        "milliseconds": 1e3 * seconds["kernels"],
        "plain_milliseconds": 1e3 * seconds["plain"],
        "reckoned_milliseconds": reckoned.Reckoned.of(part).milliseconds,
        "largest_deviation": max(deviation(one, other) for one, other in zip(found, exact, strict=True)),
        "two_runs_bitwise_equal": all(torch.equal(one, other) for one, other in zip(found, again, strict=True)),
    }


def deviation(found: Tensor, exact: Tensor) -> float:
    """Of the largest entry."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def agreement() -> dict[str, Any]:
    """Fast path against the equations in float64 on this device, and one run against another, bit by bit."""
    config = GlobalLocalConfig.from_preset("quickstart", vocab_size=512, pool_dim=256)
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).double().to(DEVICE).train()
    ids, labels = torch.randint(0, 512, (2, 4, 128), device=DEVICE)
    weights = {n: t.detach().clone().requires_grad_(n != "model.pool") for n, t in model.state_dict().items()}
    reference.loss(weights, config, ids, labels).backward()
    model(ids, shift_labels=labels).loss.backward()
    worst = max(
        float((parameter.grad - weights[name].grad).abs().max() / weights[name].grad.abs().max().clamp_min(1e-4))
        for name, parameter in model.named_parameters()
    )
    model = model.bfloat16()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, shift_labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    same = all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    return {"largest_relative_difference_of_a_gradient": worst, "two_runs_bitwise_equal": same}


def kernel_tests() -> dict[str, Any]:
    """The tests that run on a card, there; without one in Triton's interpreter. What fails is printed."""
    command = [sys.executable, "-m", "pytest", "-n2", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | ({} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {"outcome": done.stdout.strip().splitlines()[-1]}

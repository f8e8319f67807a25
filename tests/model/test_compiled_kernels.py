"""Every Triton kernel becomes code for an H100 or H200. That needs no card: the compiler comes with Triton.

What the interpreter cannot say is said here: that the compiler takes a kernel, and that its tiles fit into the card's
shared memory, at the sizes of the presets `small` and `base`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'globallocal[dev]' on Linux")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model import kernels_convolution_globallocal as convolution
from model import kernels_delta_globallocal as delta
from model import kernels_loss_globallocal as loss
from model import kernels_router_globallocal as router
from model import kernels_summary_globallocal as summary
from model.ops_router_globallocal import RowChoice
from tests.variants import some_of

SHARED_BYTES = 227 * 1024  # that a program of an H100 or H200 may have


class _Card:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What is launched inside is compiled and not run; by name."""
    kernels: dict[str, Any] = {}
    compile_or_run = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels[self.fn.__name__] = compile_or_run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Card())
    yield kernels
    assert kernels
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= SHARED_BYTES, name
        assert kernel.asm["cubin"], name


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("width", [512, 768])
def test_convolutions(compiled: dict[str, Any], width: int) -> None:
    x, weight = half(2, 1024, width), half(2, width, 3 * width)
    grad = convolution.convolve(x, weight, half(2, width), [1, 512])
    convolution.input_gradient(grad, weight, [1, 512])
    convolution.weight_gradient(grad, x, 3, [1, 512])
    assert len(compiled) == 3


@pytest.mark.parametrize("width", [128, 192])
def test_routers(compiled: dict[str, Any], width: int) -> None:
    tokens, table, values = half(256, width), half(4096, width), half(256, 2)
    router.top_rows_by_kernel(tokens, table, half(4096), 2)
    choice = RowChoice(torch.zeros(256, 2, dtype=torch.int64), 4096)
    router.mix_by_kernel(table, choice.indices, values)
    router.dot_by_kernel(table, choice.indices, tokens)
    for summed in (tokens, None):
        router.sum_by_row_by_kernel(
            values, summed, choice.order, choice.row_starts, choice.piece_starts, choice.piece_rows
        )
    assert len(compiled) == 5


def test_vocabulary_loss(compiled: dict[str, Any]) -> None:
    loss.cross_entropy_by_kernel_(half(8, 32000), torch.zeros(8, dtype=torch.int64))
    assert len(compiled) == 1


def test_summary_of_averages(compiled: dict[str, Any]) -> None:
    query, value, log_keep = half(2, 128, 64), half(2, 128, 8, 64), torch.zeros(2, 128, 8)
    answers, before, last = summary.summary_forward(query, query, value, log_keep)
    summary.summary_backward(query, query, value, log_keep, before, answers, last)
    assert len(compiled) == 3


@pytest.mark.parametrize(("d", "p"), some_of([(64, 64)], [(32, 128), (16, 16)]))
def test_delta_rule(compiled: dict[str, Any], d: int, p: int) -> None:
    query, value, gates = torch.zeros(2, 128, 1, d), torch.zeros(2, 128, 8, p), torch.zeros(2, 128, 8)
    parts = (query, query, value, gates, gates)
    answers, last, *kept = delta.delta_forward(*parts)
    delta.delta_backward(parts, kept, answers, last)
    assert len(compiled) == 5

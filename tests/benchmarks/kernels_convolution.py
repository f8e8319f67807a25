"""The convolutions' kernels against products over copied taps, on a GPU.

Run as `python -m tests.benchmarks.kernels_convolution`, with an h for one shape alone. Each candidate is first compared
with the products, in bfloat16; then its time is the median of a few runs. What is fastest goes into `TUNED` of
`model/kernels_convolution_globallocal.py`.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from model import kernels_convolution_globallocal as kernels
from model import ops_convolution_globallocal as ops

SHAPES = [(64, 1024, 512), (32, 1024, 768)]  # B, S, h
TAPS, DILATIONS = 3, [128, 512]
CANDIDATES = 3  # each is compiled, which takes longer than its runs
RUNS = 10
LARGEST_DEVIATION = 0.02  # of the largest entry; bfloat16 keeps 8 bits, and the products round between their sums


def milliseconds(call: Callable[[], object]) -> float:
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairwise(events))
    return times[RUNS // 2]


def compare(batch: int, length: int, h: int) -> bool:
    """Prints a line a candidate; whether all of them agree with the products."""
    torch.manual_seed(0)
    branches, dilations = len(DILATIONS), torch.tensor(DILATIONS)
    x = torch.randn(batch, length, h, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(branches, h, TAPS * h, device="cuda", dtype=torch.bfloat16) * (TAPS * h) ** -0.5
    bias = torch.randn(branches, h, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(batch, length, branches * h, device="cuda", dtype=torch.bfloat16)
    teraflop = 2e-12 * batch * length * branches * TAPS * h * h

    def line(name: str, what: str, duration: float, products: int, note: str = "") -> None:
        rate = products * teraflop / duration * 1e3
        print(f"{name:9}{what:42}{duration:8.3f} ms{rate:8.0f} TFLOP/s  {note}", flush=True)

    print(f"B = {batch}, S = {length}, h = {h}, dilations {DILATIONS}")
    plain_forward, plain_backward = products(x, weight, bias, grad)
    expected = dict(zip(("input", "weight"), plain_backward(), strict=True), forward=plain_forward())
    line("forward", "products", milliseconds(plain_forward), 1)
    line("backward", "products", milliseconds(plain_backward), 2)
    calls: dict[str, Callable[[kernels.Tiles | None], Tensor]] = {
        "forward": lambda tiles: kernels.convolve(x, weight, bias, DILATIONS, tiles),
        "input": lambda tiles: kernels.input_gradient(grad, weight, DILATIONS, tiles),
        "weight": lambda tiles: kernels.weight_gradient(grad, x, TAPS, DILATIONS, tiles),
    }
    right = True
    for name, call in calls.items():
        fastest = []
        for tiles in list(kernels.configurations(name, h, x.dtype))[:CANDIDATES]:
            result = call(tiles)
            far = ((result - expected[name]).abs().max() / expected[name].abs().max()).item()
            same = torch.equal(result, call(tiles))
            right &= far < LARGEST_DEVIATION and same
            note = f"deviation {far:.4f}" + ("" if same else ", NOT THE SAME TWICE")
            fastest.append((milliseconds(lambda tiles=tiles, call=call: call(tiles)), tiles))
            line(name, " ".join(f"{k}={v}" for k, v in tiles._asdict().items()), fastest[-1][0], 1, note)
        print(f'    ("{name}", {h}): {min(fastest)[1]},')
    line("forward", "as wired", milliseconds(lambda: ops.convolution_forward(x, weight, bias, dilations)), 1)
    line("backward", "as wired", milliseconds(lambda: ops.convolution_backward(grad, x, weight, dilations)), 2)
    return right


def products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward without the kernels."""
    dilations = torch.tensor(DILATIONS)

    def without(function: Callable[..., Any], *arguments: object) -> Any:
        with mock.patch.object(ops, "suits_kernels", return_value=False):
            return function(*arguments)

    return (
        lambda: without(ops.convolution_forward, x, weight, bias, dilations),
        lambda: without(ops.convolution_backward, grad, x, weight, dilations),
    )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: no GPU; this benchmark needs one")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    results = [compare(*shape) for shape in SHAPES if sys.argv[1:] in ([], [str(shape[2])])]
    if not all(results):
        sys.exit(f"error: a kernel is farther than {LARGEST_DEVIATION} from the products, or not the same twice")

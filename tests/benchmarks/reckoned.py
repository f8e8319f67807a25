"""What the parts of a layer move through memory and multiply, per token and pass; and the time that follows on an H200.

Nothing here is measured. Written out as tensor operations, a part's bytes are counted as its operations run: each reads
its inputs and writes its outputs once. By kernels they follow from the kernels' own tables (model/kernels_*.py), and
weights and rows of tables stay in the cache. Forward and backward together; sizes of the preset `small`, bfloat16.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import ops_loss_globallocal, ops_router_globallocal
from model.library_globallocal import GPU_BLOCK_FACTOR
from model.ops_convolution_globallocal import causal_convolutions
from model.ops_delta_globallocal import gated_delta_rule
from model.ops_loss_globallocal import vocabulary_loss
from model.ops_router_globallocal import RowChoice, dot_rows, mix_rows, top_rows
from model.ops_summary_globallocal import decayed_attention

BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 785e12
EXACT_PRODUCTS = 6  # products of float32 numbers: three, each at half the rate
SEQUENCES, LENGTH = 8, 1024  # in which a part is counted: the largest block of the vocabulary loss on a GPU
TOKENS = SEQUENCES * LENGTH
LAYER_TOKENS = 65_536  # 64 × 1,024: what a micro-batch of `small` has

H, N, R, K, V = 512, 4096, 128, 2, 32_000  # hidden, pool rows, router's width, rows chosen, vocabulary
BRANCHES, TAPS = 2, 3
HEADS, D, P, C = 8, 64, 64, 64  # the summary's heads, width of its keys and of a head, chunk
W = 2  # bytes of a number
BLOCKS = (ops_loss_globallocal, "LOGIT_BLOCK_ELEMENTS"), (ops_router_globallocal, "SCORE_BLOCK_ELEMENTS")


@dataclass(frozen=True)
class Part:
    """Per token, forward and backward.

    Attributes:
        plain: written out as tensor operations.
        flops: of the kernels.
        exact: products of float32 numbers.
        measured: milliseconds on an H200 for 65,536 tokens, of docs/benchmarks.md: written out → by kernels.
    """

    name: str
    plain: Callable[[], Any]
    bytes: float
    flops: float
    exact: bool = False
    measured: str = "—"


class Moved(TorchDispatchMode):
    """Bytes that operations read and write; a view moves none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        returns = [item.alias_info for item in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not view and "empty" not in str(function) and "_unsafe_view" not in str(function):
            tensors = [x for x in tree_leaves((arguments, keywords, result)) if isinstance(x, Tensor)]
            self.bytes += sum(_bytes(x) for x in tensors)
        return result


def _bytes(x: Tensor) -> int:
    """Of what lies in memory: an expanded dimension counts once."""
    elements = 1
    for size, step in zip(x.shape, x.stride(), strict=True):
        elements *= size if step else 1
    return elements * x.element_size()


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.rand(shape).to(dtype).requires_grad_()


def convolutions() -> Any:
    weight, bias = leaf(BRANCHES, H, TAPS * H), leaf(BRANCHES, H)
    causal_convolutions(leaf(SEQUENCES, LENGTH, H), weight, bias, torch.tensor([1, 512], device="cpu")).sum().backward()


def average() -> Any:
    query, key = leaf(SEQUENCES, LENGTH, D), leaf(SEQUENCES, LENGTH, D)
    gates = (-torch.rand(SEQUENCES, LENGTH, HEADS)).requires_grad_()
    decayed_attention(query, key, leaf(SEQUENCES, LENGTH, HEADS, P), gates, None)[0].sum().backward()


def delta() -> Any:
    wide = torch.float32
    query, key, value = (leaf(SEQUENCES, LENGTH, n, size, dtype=wide) for n, size in ((1, D), (1, D), (HEADS, P)))
    gates, write = (-torch.rand(SEQUENCES, LENGTH, HEADS)).requires_grad_(), leaf(SEQUENCES, LENGTH, HEADS, dtype=wide)
    gated_delta_rule(query, key, value, gates, write, None)[0].sum().backward()


def best_rows() -> Any:
    top_rows(leaf(TOKENS, R), leaf(N, R), leaf(N), K)


def rows() -> Any:
    choice = RowChoice(torch.randint(N, (TOKENS, K)), N)
    scores = dot_rows(leaf(TOKENS, R), leaf(N, R), leaf(N), choice)
    mix_rows(scores.softmax(dim=-1), leaf(N, H), choice).sum().backward()


def loss() -> Any:
    vocabulary_loss(leaf(TOKENS, H), leaf(V, H), leaf(V), torch.randint(V, (TOKENS,)))[0].backward()


def parts() -> list[Part]:
    """One of each kind; bytes and operations of the kernels."""
    state = HEADS * D * P / C
    averages = W * (8 * D + 7 * HEADS * P + 5 * state) + 20 * HEADS
    average_flops = 2 * HEADS * (6 * D * P + C * D + 3 * C * P) + 6 * C * D
    deltas = 4 * (10 * D + 11 * HEADS * P + 3 * HEADS * C + 5 * state) + 44 * HEADS
    by_head = 20 * C * C + 8 * C * D + 2 * C * D * P / 32 + 12 * C * P + 18 * D * P
    products = 6 * BRANCHES * TAPS * H * H
    chosen = K * (3 * W + 6 * 8)  # weights, scores, gradients; indices and their order
    read = W * (4 * R + 2 * H + K * (R + H))  # tokens and results, and again by row
    return [
        Part("router: best rows", best_rows, R * W + K * (W + 8), 2 * N * R, measured="→ 0.29"),
        Part("router: chosen scores, mixtures, sums by row", rows, read + chosen, 6 * K * (R + H)),
        Part("summary, average", average, averages, average_flops, measured="7.05 → 1.27"),
        Part("summary, delta rule", delta, deltas, HEADS * by_head + 6 * C * D, exact=True),
        Part("convolutions", convolutions, (3 + 4 * BRANCHES) * H * W, products, measured="3.31 → 0.92"),
        # Logits written, softened in place, summed and read by two products; hidden states.
        Part("vocabulary loss", loss, 6 * V * W + 4 * H * W, 6 * V * H),
    ]  # fmt: skip


def counted(function: Callable[[], Any]) -> tuple[float, float]:
    """Bytes and operations per token of a part written out, in blocks as large as on a GPU."""
    with ExitStack() as stack:
        for module, name in (
            (ops_loss_globallocal, "LOGIT_BLOCK_ELEMENTS"),
            (ops_router_globallocal, "SCORE_BLOCK_ELEMENTS"),
        ):
            stack.enter_context(patch.object(module, name, getattr(module, name) * GPU_BLOCK_FACTOR))
        stack.enter_context(torch.device("meta"))  # operations run without numbers
        moved, flops = stack.enter_context(Moved()), stack.enter_context(FlopCounterMode(display=False))
        function()
    return moved.bytes / TOKENS, flops.get_total_flops() / TOKENS


def milliseconds(bytes_: float, flops: float, exact: bool) -> float:
    """Of a micro-batch, by what takes longer."""
    products = flops * (EXACT_PRODUCTS if exact else 1) / FLOPS_PER_SECOND
    return 1e3 * LAYER_TOKENS * max(bytes_ / BYTES_PER_SECOND, products)


def table() -> list[str]:
    """Markdown."""
    lines = [
        "| part | kB per token, plain | by kernels | million operations | ms, plain | by kernels | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in parts():
        plain_bytes, plain_flops = counted(part.plain)
        plain = milliseconds(plain_bytes, plain_flops, part.exact)
        kernel = milliseconds(part.bytes, part.flops, part.exact)
        figures = f"{plain_bytes / 1e3:,.1f} | {part.bytes / 1e3:,.1f} | {part.flops / 1e6:,.2f}"
        lines.append(f"| {part.name} | {figures} | {plain:,.2f} | {kernel:,.2f} | {part.measured} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))

"""What every operation of a pass moves through memory and multiplies, per token, and the time that follows on an H200.

Nothing here is measured. Plain, bytes are counted as the operations run: each reads its inputs and writes its outputs
once. By kernels they follow from the kernels' own tables (model/kernels_*.py); what the compiler fuses reads its inputs
and writes its outputs once, and once more backward. Preset `small`, 64 × 1,024 tokens, bfloat16.

`python -m tests.benchmarks.reckoned` prints the table of docs/model.md.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import ops_loss_globallocal, ops_router_globallocal
from model.configuration_globallocal import SUMMARY_CHUNK, GlobalLocalConfig
from model.library_globallocal import GPU_BLOCK_FACTOR
from model.ops_convolution_globallocal import causal_convolutions
from model.ops_delta_globallocal import gated_delta_rule
from model.ops_loss_globallocal import vocabulary_loss
from model.ops_router_globallocal import RowChoice, dot_rows, mix_rows, sum_by_row, top_rows
from model.ops_summary_globallocal import decayed_attention

BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 785e12
EXACT_PRODUCTS = 6  # products of float32 numbers: three, each at half the rate
MICRO_BATCH = (64, 1024)
TOKENS = MICRO_BATCH[0] * MICRO_BATCH[1]

CONFIG = GlobalLocalConfig.from_preset("small")
H, V, LAYERS = CONFIG.hidden_size, CONFIG.vocab_size, CONFIG.num_hidden_layers
N, DIM, R, K = CONFIG.pool_size, CONFIG.pool_dim, CONFIG.router_hidden_size, CONFIG.router_top_k
BRANCHES, TAPS = 2, CONFIG.conv_kernel_size
HEADS, D, P, C = CONFIG.summary_heads, CONFIG.summary_key_size, H // CONFIG.summary_heads, SUMMARY_CHUNK
ROUTERS = LAYERS * CONFIG.routers_per_layer
W = 2  # bytes of a number
MEASURED_PASS = "139 → 48.2"  # of the device: before there were kernels, not compiled; with them, compiled


@dataclass(frozen=True)
class Step:
    """A function, and what makes its arguments on the default device from the shape of a micro-batch."""

    run: Callable[..., Any]
    arguments: Callable[[int, int], list[Tensor]]


@dataclass(frozen=True)
class Part:
    """Steps of a pass that belong together.

    Attributes:
        times: in a pass.
        bytes: of the kernels, per token, forward and backward; None where there is none and the compiler fuses.
        flops: likewise; None where they are those of the plain form.
        exact: products of float32 numbers.
        measured: milliseconds on an H200 for one micro-batch, of docs/benchmarks.md: plain → by kernels.
    """

    name: str
    times: int
    steps: list[Step]
    bytes: float | None = None
    flops: float | None = None
    exact: bool = False
    measured: str = "—"


# ---- counting


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
            self.bytes += _bytes((arguments, keywords, result))
        return result


def _bytes(values: Any) -> int:
    """Of what lies in memory: an expanded dimension counts once."""
    total = 0
    for x in tree_leaves(values):
        if isinstance(x, Tensor):
            elements = 1
            for size, step in zip(x.shape, x.stride(), strict=True):
                elements *= size if step else 1
            total += elements * x.element_size()
    return total


def prepared(step: Step, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
    """Runs a step forward and backward: its results and the gradients of its arguments. Seeded.

    Args:
        dtype: in place of the arguments' own, where they are floating.
    """
    torch.manual_seed(0)
    arguments = step.arguments(*shape)
    if dtype is not None:
        arguments = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in arguments]
    leaves = [x for x in arguments if x.requires_grad]
    found = _differentiable(step.run(*arguments))
    grads = [torch.randn(x.shape, device=x.device).bfloat16().to(x.dtype) for x in found]  # the same in every dtype

    def run() -> list[Tensor]:
        found = _differentiable(results := step.run(*arguments))
        backward = torch.autograd.grad(found, leaves, grads, allow_unused=True) if found else ()
        return [x.detach() for x in (*tree_leaves(results), *backward) if x is not None and x.is_floating_point()]

    return run


def _differentiable(results: Any) -> list[Tensor]:
    return [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.requires_grad]


@contextmanager
def without_numbers() -> Iterator[None]:
    """Operations run on shapes alone, in blocks as large as on a GPU."""
    blocks = (ops_loss_globallocal, "LOGIT_BLOCK_ELEMENTS"), (ops_router_globallocal, "SCORE_BLOCK_ELEMENTS")
    with ExitStack() as stack:
        for module, name in blocks:
            stack.enter_context(patch.object(module, name, getattr(module, name) * GPU_BLOCK_FACTOR))
        yield stack.enter_context(torch.device("meta"))


def counted(prepare: Callable[[], list[Callable[[], Any]]]) -> tuple[float, float]:
    """Bytes and operations per token of the calls that are prepared."""
    with without_numbers():
        calls = prepare()
        with Moved() as moved, FlopCounterMode(display=False) as flops:
            for call in calls:
                call()
    return moved.bytes / TOKENS, flops.get_total_flops() / TOKENS


def plain(part: Part) -> tuple[float, float]:
    """Bytes and operations per token, written out as tensor operations."""
    return counted(lambda: [prepared(step, MICRO_BATCH) for step in part.steps])


def fused(part: Part) -> float:
    """Bytes per token where each step is one piece, and one more backward unless its gradient is handed on as it is."""
    total, kept = 0, []
    with without_numbers():
        for step in part.steps:
            arguments = step.arguments(*MICRO_BATCH)
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(True) or x, lambda x: x):
                results = step.run(*arguments)
            total += _bytes(arguments) + _bytes(results)
            if kept:
                total += _bytes(arguments) + _bytes(results) + _bytes([x for x in arguments if x.requires_grad])
    return total / TOKENS


# ---- the parts of a pass


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def weight(*shape: int) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).bfloat16().requires_grad_()


def linear(inner: int, outer: int) -> Step:
    return Step(F.linear, lambda b, s: [leaf(b, s, inner), weight(outer, inner), leaf(outer)])


def norm(width: int, affine: bool) -> Step:
    def run(x: Tensor, *more: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), *more)

    return Step(run, lambda b, s: [leaf(b, s, width), *([leaf(width), leaf(width)] if affine else [])])


def of_tokens(run: Callable[..., Any], *widths: int) -> Step:
    return Step(run, lambda b, s: [leaf(b, s, width) for width in widths])


def _added(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _convolutions(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return causal_convolutions(x, weights, bias, torch.tensor([1, 512], device="cpu"))


def _summary_gates(keep: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    log_keep = F.logsigmoid(keep.float())
    return log_keep, value.unflatten(-1, (HEADS, -1)) * (1.0 - log_keep.exp()).to(value.dtype).unsqueeze(-1)


def _summary_answer(answer: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm(answer.unflatten(-1, (HEADS, -1)), (P,)).flatten(2).to(gate.dtype) * F.silu(gate)


def _softmax(scores: Tensor) -> Tensor:
    return (scores.float() / 0.5).clamp(-10.0, 10.0).softmax(dim=-1)


def _rows(tokens: Tensor, keys: Tensor, bias: Tensor, table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    choice = RowChoice(indices, N)
    weights = dot_rows(tokens, keys, bias, choice)
    return mix_rows(weights, table, choice), sum_by_row(weights, choice)


def _best(tokens: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return top_rows(tokens, keys, bias, K)[0]


def _mixed(before: Tensor, answer: Tensor, routed: Tensor, local: Tensor, x: Tensor, row: Tensor) -> Tensor:
    return x + torch.lerp(routed + answer, local, torch.sigmoid(F.linear(before, row)))


def _mixed_arguments(batch: int, length: int) -> list[Tensor]:
    return [*(leaf(batch, length, H) for _ in range(5)), weight(1, H)]


def _average_arguments(batch: int, length: int) -> list[Tensor]:
    shapes = (batch, length, D), (batch, length, D), (batch, length, HEADS, P)
    return [*(leaf(*shape) for shape in shapes), (-torch.rand(batch, length, HEADS)).requires_grad_()]


def _delta_arguments(batch: int, length: int) -> list[Tensor]:
    shapes = (batch, length, 1, D), (batch, length, 1, D), (batch, length, HEADS, P)
    query, key, value = (leaf(*shape, dtype=torch.float32) for shape in shapes)
    query, key = (F.normalize(x.detach(), dim=-1).requires_grad_() for x in (query, key))
    gates = -torch.rand(batch, length, HEADS), torch.rand(batch, length, HEADS)
    return [query, key, value, *(x.requires_grad_() for x in gates)]


def kernels() -> list[Part]:
    """What has kernels; their bytes and operations as the kernels' modules have them."""
    state = HEADS * D * P / C
    averages = W * (8 * D + 7 * HEADS * P + 5 * state) + 20 * HEADS
    average_flops = 2 * HEADS * (6 * D * P + C * D + 3 * C * P) + 6 * C * D
    deltas = 4 * (10 * D + 11 * HEADS * P + 3 * HEADS * C + 5 * state) + 44 * HEADS
    by_head = 20 * C * C + 8 * C * D + 2 * C * D * P / 32 + 12 * C * P + 18 * D * P
    chosen = K * (4 * W + 6 * 8)  # weights, scores, gradients, weights of the sums; indices and their order
    read = W * (4 * R + 2 * H + K * (R + H))  # tokens and results, and again by row
    best = Step(_best, lambda b, s: [x.detach() for x in (leaf(b * s, R), weight(N, R), leaf(N))])
    rows = Step(_rows, lambda b, s: [leaf(b * s, R), weight(N, R), leaf(N), leaf(N, H), torch.randint(N, (b * s, K))])
    summary = Step(lambda q, k, v, keep: decayed_attention(q, k, v, keep, None)[0], _average_arguments)
    rule = Step(lambda q, k, v, keep, write: gated_delta_rule(q, k, v, keep, write, None)[0], _delta_arguments)
    taps = Step(_convolutions, lambda b, s: [leaf(b, s, H), weight(BRANCHES, H, TAPS * H), leaf(BRANCHES, H)])
    loss = Step(
        lambda *x: vocabulary_loss(*x)[0],
        lambda b, s: [leaf(b * s, H), weight(V, H), leaf(V), torch.randint(V, (b * s,))],
    )
    # Of the loss: logits written, softened in place, summed and read by two products; hidden states.
    return [
        Part("router: best rows", ROUTERS, [best], R * W + K * (W + 8), measured="→ 0.29"),
        Part("router: chosen scores, mixtures, sums by row", ROUTERS, [rows], read + chosen, 6 * K * (R + H)),
        Part("summary, average", LAYERS, [summary], averages, average_flops, measured="7.05 → 1.27"),
        Part("summary, delta rule", 0, [rule], deltas, HEADS * by_head + 6 * C * D, exact=True),
        Part("convolutions", LAYERS, [taps], (3 + 4 * BRANCHES) * H * W, measured="3.31 → 0.92"),
        Part("vocabulary loss", 1, [loss], 6 * V * W + 4 * H * W),
    ]


def others() -> list[Part]:
    """What has none: products are the library's, the rest is fused by the compiler."""
    summary_width = 2 * D + 2 * H + HEADS
    pool = Step(F.linear, lambda b, s: [leaf(N, DIM).detach(), weight(H, DIM)])
    wide = CONFIG.intermediate_size
    return [
        Part("norms", 3 * LAYERS + 1, [norm(H, affine=True)]),
        Part("convolutions: projection", LAYERS, [linear(BRANCHES * H, H)]),
        Part("summary: linear maps", LAYERS, [linear(H, summary_width), linear(H, H)]),
        Part("summary: gates, norm", LAYERS, [of_tokens(_summary_gates, HEADS, H), of_tokens(_summary_answer, H, H)]),
        Part("router: linear maps", ROUTERS, [linear(H, R), linear(H, DIM), linear(DIM, H), pool]),
        Part(
            "router: activation, norm, softmax, sum", ROUTERS,
            [of_tokens(F.relu, R), norm(DIM, affine=False), of_tokens(_softmax, K), of_tokens(_added, H, H)],
        ),
        Part("feed-forward: linear maps", LAYERS, [linear(H, wide), linear(wide, H)]),
        Part("activations (GELU)", LAYERS, [of_tokens(F.gelu, BRANCHES * H), of_tokens(F.gelu, wide)]),
        Part(
            "branches' gate and residual sums", LAYERS,
            [of_tokens(_added, H, H), Step(_mixed, _mixed_arguments), *[of_tokens(_added, H, H)] * 2],
        ),
        Part("embedding", 1, [Step(F.embedding, lambda b, s: [torch.randint(V, (b, s)), weight(V, H)])]),
    ]  # fmt: skip


# ---- the table


@dataclass(frozen=True)
class Reckoned:
    """Of one part, per token: bytes and operations, plain and by kernels."""

    plain_bytes: float
    plain_flops: float
    bytes: float
    flops: float
    exact: bool

    @staticmethod
    def of(part: Part) -> "Reckoned":
        moved, flops = plain(part)
        least = fused(part) if part.bytes is None else part.bytes
        return Reckoned(moved, flops, least, flops if part.flops is None else part.flops, part.exact)

    @property
    def plain_milliseconds(self) -> float:
        return milliseconds(self.plain_bytes, self.plain_flops, self.exact)

    @property
    def milliseconds(self) -> float:
        return milliseconds(self.bytes, self.flops, self.exact)


def milliseconds(bytes_: float, flops: float, exact: bool) -> float:
    """Of a micro-batch, by what takes longer."""
    products = flops * (EXACT_PRODUCTS if exact else 1) / FLOPS_PER_SECOND
    return 1e3 * TOKENS * max(bytes_ / BYTES_PER_SECOND, products)


def reckon() -> list[tuple[Part, Reckoned]]:
    return [(part, Reckoned.of(part)) for part in kernels() + others()]


def table(reckoned: list[tuple[Part, Reckoned]]) -> list[str]:
    """Markdown; the last line is the sum over a pass."""
    lines = [
        "| part | in a pass | kB per token, plain | by kernels | MFLOP | ms, plain | by kernels | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = [0.0] * 5
    for part, one in reckoned:
        moved = one.plain_bytes / 1e3, one.bytes / 1e3, one.flops / 1e6
        figures = [*moved, one.plain_milliseconds, one.milliseconds]
        total = [so_far + part.times * figure for so_far, figure in zip(total, figures, strict=True)]
        lines.append(_line(part.name, str(part.times or "—"), figures, part.measured))
    return [*lines, _line("**a pass**", "", total, MEASURED_PASS)]


def _line(name: str, times: str, figures: list[float], measured: str) -> str:
    moved, least, *rest = figures
    cells = [f"{moved:,.1f}", f"{least:,.1f}", *(f"{figure:,.2f}" for figure in rest)]
    return f"| {' | '.join([name, times, *cells, measured])} |"


if __name__ == "__main__":
    print("\n".join(table(reckon())))

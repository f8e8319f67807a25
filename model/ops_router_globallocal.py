"""The router's operations: the best rows of a table for each token, mixtures of chosen rows, and sums by row.

They compute what autograd would, with less work or memory, and give the same bits for any number of threads: sums over
tokens that chose the same row are taken in the order of the tokens (a stable sort), never by atomic additions. Plain
torch stands here; on a GPU the kernels of `kernels_router_globallocal.py` do the same where Triton is installed.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .configuration_globallocal import PIECE_ENTRIES
from .library_globallocal import block_rows, exporting, has_kernels, opaque

with suppress(ImportError):  # without Triton `has_kernels` is false; by its name, so that the file travels with exports
    from .kernels_router_globallocal import dot_by_kernel, mix_by_kernel, sum_by_row_by_kernel, top_rows_by_kernel

BALANCE_GRADIENT = 1e-5
SCORE_BLOCK_ELEMENTS = 2**22  # the largest block of pool scores


class RowChoice:
    """Which k rows of a table of N every one of T tokens chose, and the same thing grouped by row.

    Args:
        indices: int64 [T, k], values in [0, N).
        num_rows: N.
        grouped: False where only the chosen rows are read: no sums by row, no gradients.

    Attributes:
        order: int64 [T·k], the choices sorted by row, within a row in the order of the tokens.
        row_starts: int64 [N + 1], where each row begins in `order`.
        piece_starts, piece_rows: the rows cut into pieces, for kernels; see `kernels_router_globallocal.py`.
    """

    def __init__(self, indices: Tensor, num_rows: int, grouped: bool = True) -> None:
        self.indices = indices
        if not grouped:
            return
        narrow = torch.int16 if num_rows < 2**15 else torch.int32  # short keys are sorted in fewer passes
        ordered, self.order = indices.reshape(-1).to(narrow).sort(stable=True)
        rows = torch.arange(num_rows + 1, device=indices.device, dtype=narrow)
        self.row_starts = self.piece_starts = self.piece_rows = torch.searchsorted(ordered, rows)
        if not has_kernels(indices):
            return
        pieces = (self.row_starts.diff() + (PIECE_ENTRIES - 1)) // PIECE_ENTRIES
        self.piece_starts = F.pad(pieces.cumsum(0), (1, 0))
        # How many pieces there are is only known on the device: at most so many.
        most = -(-indices.numel() // PIECE_ENTRIES) + num_rows
        numbers = torch.arange(most, device=indices.device)
        self.piece_rows = torch.searchsorted(self.piece_starts, numbers, right=True) - 1

    def sum_by_row(self, values: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ over the choices of row n of `values` [T, k], each times its token's row of `tokens` [T, c].

        Returns [N, c], or nothing to read without `tokens`, and the sums of the values alone, [N].
        """
        return _sum_by_row(values, tokens, self.order, self.row_starts, self.piece_starts, self.piece_rows)


def _sum_by_row_shape(
    values: Tensor, tokens: Tensor | None, order: Tensor, row_starts: Tensor, piece_starts: Tensor, piece_rows: Tensor
) -> tuple[Tensor, Tensor]:
    rows = row_starts.shape[0] - 1
    sums = values.new_empty(rows, 0) if tokens is None else tokens.new_empty(rows, tokens.shape[1])
    return sums, values.new_empty(rows)


@opaque(_sum_by_row_shape)
def _sum_by_row(
    values: Tensor, tokens: Tensor | None, order: Tensor, row_starts: Tensor, piece_starts: Tensor, piece_rows: Tensor
) -> tuple[Tensor, Tensor]:
    if has_kernels(values):
        return sum_by_row_by_kernel(values, tokens, order, row_starts, piece_starts, piece_rows)
    ordered, offsets = values.reshape(-1)[order], row_starts[:-1]
    entries = torch.arange(len(order), device=order.device)
    totals = F.embedding_bag(entries, ordered.unsqueeze(1), offsets, mode="sum").squeeze(1)
    if tokens is None:
        return values.new_empty(len(offsets), 0), totals.clone()
    choice = order // values.shape[1]
    return F.embedding_bag(choice, tokens, offsets, mode="sum", per_sample_weights=ordered), totals.clone()


def _dot_shape(table: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    return table.new_empty(indices.shape)


@opaque(_dot_shape)
def _dot(table: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    """tokens[t] · table[indices[t, j]] for every t, j: [T, k]."""
    if has_kernels(tokens):
        return dot_by_kernel(table, indices, tokens)
    return torch.bmm(table[indices], tokens.unsqueeze(2)).squeeze(2)


def _mix_shape(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1])


@opaque(_mix_shape)
def _mix(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[t, j] · table[indices[t, j]] for every t: [T, c]."""
    if exporting():
        return torch.bmm(weights.unsqueeze(1), F.embedding(indices, table)).squeeze(1)
    if has_kernels(weights):
        return mix_by_kernel(table, indices, weights)
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


class _DotRows(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, bias: Tensor, choice: RowChoice) -> Tensor:
        ctx.save_for_backward(tokens, table)
        ctx.choice = choice
        return _dot(table, choice.indices, tokens) + bias[choice.indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, table = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table, grad_bias = ctx.choice.sum_by_row(grad, tokens)
        return _mix(table, ctx.choice.indices, grad), grad_table, grad_bias, None


class _MixRows(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, choice: RowChoice) -> Tensor:
        ctx.save_for_backward(weights, table)
        ctx.choice = choice
        return _mix(table, choice.indices, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, table = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = ctx.choice.sum_by_row(weights, grad)[0] if ctx.needs_input_grad[1] else None
        return _dot(table, ctx.choice.indices, grad), grad_table, None


class _SumByRow(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, choice: RowChoice) -> Tensor:
        ctx.choice = choice
        return choice.sum_by_row(values)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.choice.indices], None


class _Balance(Function):
    """The scores as they are; backwards, a row's balance is told whether the row was chosen too often."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, balance: Tensor, choice: RowChoice) -> Tensor:
        ctx.choice, ctx.dtype = choice, balance.dtype
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts = ctx.choice.row_starts.diff()
        excess = counts * len(counts) - ctx.choice.indices.numel()
        return grad, (BALANCE_GRADIENT * excess.sign()).to(ctx.dtype), None


def balanced(scores: Tensor, balance: Tensor, choice: RowChoice) -> Tensor:
    """Scores [T, k], unchanged; `balance` [N] falls where a row was chosen more often than the mean, or rises.

    Its gradient is the sign alone, and so small that the norm of all gradients does not feel it: an optimizer that
    divides by their size, as Adam does, moves it by its learning rate. So ranks, micro-batches and resumes agree.
    """
    return _Balance.apply(scores, balance, choice)


def dot_rows(tokens: Tensor, table: Tensor, bias: Tensor, choice: RowChoice) -> Tensor:
    """Scores of the chosen rows alone: tokens [T, c], table [N, c], bias [N] → [T, k].

    Equal to gathering from `tokens @ table.T + bias`, whose dense gradient would be zero elsewhere.
    """
    return _DotRows.apply(tokens, table, bias, choice)


def mix_rows(weights: Tensor, table: Tensor, choice: RowChoice) -> Tensor:
    """Weighted sum of each token's rows: weights [T, k], table [N, c] → [T, c]."""
    return _MixRows.apply(weights, table, choice)


def sum_by_row(values: Tensor, choice: RowChoice) -> Tensor:
    """How much each row received: values [T, k] → [N]."""
    return _SumByRow.apply(values, choice)


def _top_rows_shape(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = tokens.new_empty(tokens.shape[0], k)
    return values, torch.empty_like(values, dtype=torch.int64)


@opaque(_top_rows_shape)
def _top_rows(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if has_kernels(tokens):
        return top_rows_by_kernel(tokens, table, bias, k)
    if exporting():
        return _top_columns(F.linear(tokens, table, bias), k)
    block = block_rows(SCORE_BLOCK_ELEMENTS, table, tokens.shape[0])
    scores = tokens.new_empty(block, table.shape[0])  # `out=`: no checkpointing policy keeps it
    parts = [
        _top_columns(torch.addmm(bias, part, table.T, out=scores[: part.shape[0]]), k) for part in tokens.split(block)
    ]
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


@torch.no_grad()
def top_rows(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and int64 indices, each [T, min(k, N)], of the largest of `tokens @ table.T + bias`.

    The [T, N] scores never exist: plain torch works in blocks of tokens, a kernel in blocks of both.
    """
    return _top_rows(tokens, table, bias, min(k, table.shape[0]))


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest in each row of [n, N]: they lie in the k groups with the largest maxima."""
    columns = scores.shape[1]
    size = next((size for size in range(64, 15, -1) if columns % size == 0 and columns >= size * k), None)
    if size is None:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    groups = scores.unflatten(1, (-1, size))
    best = groups.amax(dim=2).topk(k, dim=-1).indices
    rows = torch.arange(scores.shape[0], device=scores.device).unsqueeze(1)  # `len` would fix the number in a graph
    values, place = groups[rows, best].flatten(1).topk(k, dim=-1)  # whole groups: gather would pick each number
    return values, best.gather(1, place // size) * size + place % size

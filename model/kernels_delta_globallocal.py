"""Triton kernels of the gated delta rule, forward and backward; equations and symbols as in `ops_delta_globallocal.py`.

Four passes: the triangular systems of all chunks, by blocks of twice the size each; the chunks' states, one behind the
other in registers, and what each position writes; answers; and backwards the states from the end, then all gradients
of a chunk. No atomic additions and no timing of candidates: the same inputs give the same bits in every process.

Per token, in float32, with chunks of C = 64 and sizes as in `gated_delta_rule`:

| | bytes moved through device memory | operations |
|---|---|---|
| forward | 4·(4·G·d + 4·H·p + 2·H·C + 2·H·d·p/C) + 20·H | H·(20·C² + 4·C·d + 4·C·p + 6·d·p) |
| backward | 4·(6·G·d + 7·H·p + H·C + 3·H·d·p/C) + 24·H | H·(4·C·d + 2·C·d·p/32 + 8·C·p + 12·d·p) + 6·G·C·d |

The 20·C² are the inverse's: ten products of whole tiles take the place of 64 steps, each waiting for the one before.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .configuration_globallocal import SUMMARY_CHUNK
from .kernels_delta_backward_globallocal import _gate, _gradients_kernel, _products, _square, _states_backward_kernel
from .kernels_summary_globallocal import PRECISION, ROW_UNIT, STATE_COLUMNS, WIDEST, _decay, _in_rows, _kept, _rows
from .library_globallocal import opaque

STATE_ELEMENTS = 2**12  # of one head's state: with more, the tiles do not fit into every GPU's shared memory


def fits(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor) -> bool:
    """Whether the kernels take tensors of these sizes and dtypes."""
    d, p = query.shape[-1], value.shape[-1]
    return (
        all(x.dtype == torch.float32 for x in (query, key, value, log_keep, write))
        and all(size <= WIDEST and size % ROW_UNIT.value == 0 for size in (d, p))
        and d * p <= STATE_ELEMENTS
    )


@triton.jit
def _inverse_kernel(
    key, log_keep, write, inverses, length, heads, shared, key_batch, key_row, key_head,
    C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Inverse of 1 + the strictly lower triangle of write · key · key, decayed.

    Of blocks [[a, 0], [m, b]] with known inverses A, B of a and b, the inverse is [[A, 0], [−B·m·A, B]].
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = chunk * C + tl.arange(0, C)
    key += (batch * key_batch + head // shared * key_head) * ROW_UNIT
    passed, _end = _kept(log_keep, batch, position, length, head, heads, C)
    matrix = _products(key, key, position, length, key_row, key_row, C, D) * _decay(passed, C)
    matrix *= _gate(write, batch, position, length, head, heads)[:, None]
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # Blocks of two: their own blocks are 1.
    inverse = tl.where(row == column, 1.0, tl.where((row == column + 1) & (row % 2 == 1), -matrix, 0.0))
    for level in range(1, 6):
        below = (row >> (level + 1) == column >> (level + 1)) & (row >> level > column >> level)
        step = tl.dot(inverse, tl.where(below, matrix, 0.0), input_precision=PRECISION)
        inverse -= tl.dot(step, inverse, input_precision=PRECISION)
    inverses += ((batch * tl.cdiv(length, C) + chunk) * heads + head) * C * C
    tl.store(inverses + row * C + column, inverse)


@triton.jit
def _states_kernel(
    key, value, log_keep, write, inverses, states, updates, last, length, heads, shared,
    key_batch, key_row, key_head, value_batch, value_row, value_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """States before each chunk and behind the last, and what each position writes."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_column, chunks = tl.program_id(0) * P_BLOCK, tl.cdiv(length, C)
    rows, columns = tl.arange(0, D_BLOCK)[:, None], first_column + tl.arange(0, P_BLOCK)[None, :]
    known = (rows < D) & (columns < P)
    key += (batch * key_batch + head // shared * key_head) * ROW_UNIT
    value += (batch * value_batch + head * value_head) * ROW_UNIT + first_column
    inverses += (batch * chunks * heads + head) * C * C
    states += (batch * chunks * heads + head) * D * P + rows * P + columns
    updates += (batch * length * heads + head) * P + columns
    state = tl.zeros([D_BLOCK, P_BLOCK], tl.float32)
    for i in range(chunks):
        chunk = tl.cast(i, tl.int64)
        tl.store(states + chunk * heads * D * P, state, mask=known)
        position = chunk * C + tl.arange(0, C)
        passed, end = _kept(log_keep, batch, position, length, head, heads, C)
        gate = _gate(write, batch, position, length, head, heads)
        k = _rows(key, position, length, key_row, D, D_BLOCK)
        v = _rows(value, position, length, value_row, P - first_column, P_BLOCK)
        held = tl.dot(k, state, input_precision=PRECISION)
        wrong = gate[:, None] * (v - held * tl.exp(passed)[:, None])
        update = tl.dot(_square(inverses + chunk * heads * C * C, C), wrong, input_precision=PRECISION)
        written = (position < length)[:, None] & (columns < P)
        tl.store(updates + position[:, None] * heads * P, update, mask=written)
        left = update * tl.exp(end - passed)[:, None]
        state = tl.dot(tl.trans(k), left, state * tl.exp(end), input_precision=PRECISION)
    tl.store(last + ((batch * heads + head) * D + rows) * P + columns, state, mask=known)


@triton.jit
def _answers_kernel(
    query, key, log_keep, states, updates, answers, length, heads, shared,
    query_batch, query_row, query_head, key_batch, key_row, key_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    head, chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = chunk * C + tl.arange(0, C)
    row, column = tl.arange(0, D_BLOCK)[:, None], tl.arange(0, P_BLOCK)[None, :]
    query += (batch * query_batch + head // shared * query_head) * ROW_UNIT
    key += (batch * key_batch + head // shared * key_head) * ROW_UNIT
    states += ((batch * tl.cdiv(length, C) + chunk) * heads + head) * D * P
    q = _rows(query, position, length, query_row, D, D_BLOCK)
    state = tl.load(states + row * P + column, mask=(row < D) & (column < P), other=0.0)
    address = ((batch * length + position) * heads + head)[:, None] * P + column
    written = (position < length)[:, None] & (column < P)
    update = tl.load(updates + address, mask=written, other=0.0)
    passed, _end = _kept(log_keep, batch, position, length, head, heads, C)
    answer = tl.dot(q, state, input_precision=PRECISION) * tl.exp(passed)[:, None]
    scores = _products(query, key, position, length, query_row, key_row, C, D) * _decay(passed, C)
    tl.store(answers + address, tl.dot(scores, update, answer, input_precision=PRECISION), mask=written)


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    """The kernels' sizes; blocks are powers of two, at least the 16 of a matrix product."""
    d, p = query.shape[-1], value.shape[-1]
    blocks = [max(16, triton.next_power_of_2(size)) for size in (d, p)]
    return {"C": SUMMARY_CHUNK, "D": d, "P": p, "D_BLOCK": blocks[0], "P_BLOCK": blocks[1]}


def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length, heads, p), d = value.shape, query.shape[-1]
    chunks = (length + SUMMARY_CHUNK - 1) // SUMMARY_CHUNK
    return (
        value.new_empty(batch, length, heads, p),
        value.new_empty(batch, heads, d, p),
        value.new_empty(batch, chunks, heads, SUMMARY_CHUNK, SUMMARY_CHUNK),
        value.new_empty(batch, chunks, heads, d, p),
        value.new_empty(batch, length, heads, p),
    )


@opaque(_forward_shapes)
def delta_forward(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Answers [B, S, H, p] and last state [B, H, d, p]; for the backward pass, inverses [B, n, H, C, C], states before
    each chunk [B, n, H, d, p] and what each position writes [B, S, H, p]."""
    answers, last, inverses, states, updates = _forward_shapes(query, key, value, log_keep, write)
    (query, query_steps), (key, key_steps), (value, value_steps) = map(_in_rows, (query, key, value))
    batch, length, heads, p = value.shape
    shared, chunks = heads // key.shape[2], states.shape[1]
    log_keep, write = log_keep.contiguous(), write.contiguous()
    sizes = _sizes(query, value)
    columns = min(sizes["P_BLOCK"], STATE_COLUMNS)
    with torch.cuda.device_of(value):
        _inverse_kernel[(heads, chunks, batch)](
            key, log_keep, write, inverses, length, heads, shared, *key_steps,
            C=SUMMARY_CHUNK, D=sizes["D"], num_warps=4, num_stages=1,
        )  # fmt: skip
        _states_kernel[(triton.cdiv(p, columns), heads, batch)](
            key, value, log_keep, write, inverses, states, updates, last, length, heads, shared,
            *key_steps, *value_steps, **(sizes | {"P_BLOCK": columns}), num_warps=4, num_stages=1,
        )  # fmt: skip
        _answers_kernel[(heads, chunks, batch)](
            query, key, log_keep, states, updates, answers, length, heads, shared, *query_steps, *key_steps,
            **sizes, num_warps=4, num_stages=1,
        )  # fmt: skip
    return answers, last, inverses, states, updates


def _backward_shapes(
    inputs: Sequence[Tensor], kept: Sequence[Tensor], grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, value, log_keep, write = (x.new_empty(x.shape) for x in inputs)
    return query, key, value, log_keep, write


@opaque(_backward_shapes)
def delta_backward(
    inputs: Sequence[Tensor], kept: Sequence[Tensor], grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, from those of the answers and of the last state; kept is what came with them."""
    results = _backward_shapes(inputs, kept, grad, grad_last)
    inverses, states, updates = kept
    behind, grad_solved = torch.empty_like(states), torch.empty_like(updates)
    (query, query_steps), (key, key_steps), (value, value_steps), (grad, grad_steps) = map(
        _in_rows, (*inputs[:3], grad)
    )
    batch, length, heads, p = value.shape
    groups, chunks = key.shape[2], states.shape[1]
    shared = heads // groups
    log_keep, write = (x.contiguous() for x in inputs[3:])
    sizes = _sizes(query, value)
    columns = min(sizes["P_BLOCK"], STATE_COLUMNS)
    with torch.cuda.device_of(value):
        _states_backward_kernel[(triton.cdiv(p, columns), heads, batch)](
            query, key, log_keep, write, inverses, grad, grad_last.contiguous(), behind, grad_solved,
            length, heads, shared, *query_steps, *key_steps, *grad_steps,
            **(sizes | {"P_BLOCK": columns}), num_warps=4, num_stages=1,
        )  # fmt: skip
        _gradients_kernel[(groups, chunks, batch)](
            query, key, value, log_keep, write, states, updates, behind, grad_solved, grad, *results,
            length, heads, shared, *query_steps, *key_steps, *value_steps, *grad_steps,
            **(sizes | {"P_BLOCK": columns}), num_warps=8, num_stages=1,
        )  # fmt: skip
    return results


class _DeltaAttention(Function):
    """Keeps its inputs, the inverses, the states before each chunk and what each position writes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        answers, last, *kept = delta_forward(*inputs)
        ctx.save_for_backward(*inputs, *kept)
        return answers, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_answers: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        return delta_backward(saved[:5], saved[5:], grad_answers, grad_last)


def delta_attention(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` from state zero, for tensors that `fits` accepts."""
    answers, last = _DeltaAttention.apply(query, key, value, log_keep, write)
    return answers, last

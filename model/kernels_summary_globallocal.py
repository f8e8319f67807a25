"""Triton kernels of the running summary: its decayed attention, forward and backward.

Inside a chunk the answers are an attention with decaying scores; what was before the chunk is one state per head.
The chunks' states follow one another in registers, and only what the other chunks' kernels read is written.
No atomic additions and no timing of candidates: the same inputs give the same bits in every process.
(State space duality, https://arxiv.org/abs/2405.21060, section 6.)

Per token, with w bytes per number, chunks of C = 64 and the sizes as in `decayed_attention`; where several programs
read the same chunk, the later ones find it in the cache:

| | bytes moved through device memory | operations |
|---|---|---|
| forward | w·(3·d + 3·H·p + 2·H·d·p/C) + 8·H | 2·H·(2·d·p + C·d + C·p) |
| backward | w·(5·d + 4·H·p + 3·H·d·p/C) + 12·H | 2·H·(4·d·p + 2·C·p) + 6·C·d |

With H = 8, d = p = C = 64 and bfloat16 these are 5.6 kB and 0.26 million, 7.9 kB and 0.42 million. Written out as
tensor operations, reads and writes come to 96 kB forward and 157 kB backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .configuration_globallocal import SUMMARY_CHUNK
from .library_globallocal import opaque

ROW_UNIT = tl.constexpr(8)  # numbers; all rows begin at a multiple, so that loads are as wide as the hardware's
PRECISION = tl.constexpr("tf32x3")  # of float32 products: three on the tensor cores, as exact as one elsewhere
STATE_COLUMNS = 32  # of one state, per program: enough programs to fill a GPU with few sequences
WIDEST = 128  # key, and head
STATE_BYTES = 2**14  # of one head's state: with more, the tiles do not fit into every GPU's shared memory
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> bool:
    """Whether the kernels take tensors of these sizes and dtypes."""
    d, p = query.shape[-1], value.shape[-1]
    return (
        query.dtype == key.dtype == value.dtype
        and value.dtype in DTYPES
        and log_keep.dtype == torch.float32
        and all(size <= WIDEST and size % ROW_UNIT.value == 0 for size in (d, p))
        and d * p * value.element_size() <= STATE_BYTES
    )


@triton.jit
def _rows(first, position, length, row_step, size, BLOCK: tl.constexpr):
    """Tile [C, BLOCK] of the rows at these positions; zeros behind the sequence and beyond `size` columns."""
    column = tl.arange(0, BLOCK)
    known = (position < length)[:, None] & (column < size)[None, :]
    return tl.load(first + (position * row_step * ROW_UNIT)[:, None] + column[None, :], mask=known, other=0.0)


@triton.jit
def _kept(log_keep, batch, position, length, head, heads, C: tl.constexpr):
    """Logarithms of what is kept from the chunk's start to behind each position [C], and to the chunk's end."""
    address = log_keep + (batch * length + position) * heads + head
    passed = tl.cumsum(tl.load(address, mask=position < length, other=0.0), axis=0)
    return passed, tl.sum(tl.where(tl.arange(0, C) == C - 1, passed, 0.0), axis=0)


@triton.jit
def _decay(passed, C: tl.constexpr):
    """What position c keeps of position s ≤ c, [C, C]; of later ones, nothing."""
    earlier = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    return tl.exp(tl.where(earlier, passed[:, None] - passed[None, :], float("-inf")))


@triton.jit
def _states_kernel(
    key, value, log_keep, edge, states, length, heads, key_batch, key_row, value_batch, value_row, value_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """States before each chunk, from zeros to `edge`; reversed, their gradients behind each chunk, from `edge`.

    Going back, queries and gradients of the answers stand for keys and values.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_column = tl.program_id(0) * P_BLOCK
    rows, columns = tl.arange(0, D_BLOCK)[:, None], first_column + tl.arange(0, P_BLOCK)[None, :]
    known = (rows < D) & (columns < P)
    key += batch * key_batch * ROW_UNIT
    value += (batch * value_batch + head * value_head) * ROW_UNIT + first_column
    chunks = tl.cdiv(length, C)
    states += (batch * chunks * heads + head) * D * P + rows * P + columns
    edge += ((batch * D + rows) * heads + head) * P + columns
    dtype = value.dtype.element_ty
    state = tl.zeros([D_BLOCK, P_BLOCK], tl.float32)
    if REVERSE:
        state += tl.load(edge, mask=known, other=0.0)
    for i in range(chunks):
        chunk = tl.cast(i, tl.int64)
        if REVERSE:
            chunk = chunks - 1 - chunk
        tl.store(states + chunk * heads * D * P, state.to(dtype), mask=known)
        position = chunk * C + tl.arange(0, C)
        passed, end = _kept(log_keep, batch, position, length, head, heads, C)
        share = tl.exp(end - passed)
        if REVERSE:
            share = tl.exp(passed)
        k = _rows(key, position, length, key_row, D, D_BLOCK)
        v = _rows(value, position, length, value_row, P - first_column, P_BLOCK)
        shared = (v * share[:, None]).to(dtype)
        state = tl.dot(tl.trans(k), shared, state * tl.exp(end), input_precision=PRECISION)
    if not REVERSE:
        tl.store(edge, state, mask=known)


@triton.jit
def _answers_kernel(
    query, key, value, log_keep, before, answers, length, heads,
    query_batch, query_row, key_batch, key_row, value_batch, value_row, value_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    head, chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = chunk * C + tl.arange(0, C)
    row, column = tl.arange(0, D_BLOCK), tl.arange(0, P_BLOCK)
    written = (position < length)[:, None] & (column < P)[None, :]
    state_offset, known = row[:, None] * P + column[None, :], (row < D)[:, None] & (column < P)[None, :]
    query += batch * query_batch * ROW_UNIT
    key += batch * key_batch * ROW_UNIT
    value += (batch * value_batch + head * value_head) * ROW_UNIT
    before += ((batch * tl.cdiv(length, C) + chunk) * heads + head) * D * P
    answers += (batch * length * heads + head) * P
    q = _rows(query, position, length, query_row, D, D_BLOCK)
    k = _rows(key, position, length, key_row, D, D_BLOCK)
    v = _rows(value, position, length, value_row, P, P_BLOCK)
    state = tl.load(before + state_offset, mask=known, other=0.0)
    passed, _end = _kept(log_keep, batch, position, length, head, heads, C)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * _decay(passed, C)
    answer = tl.dot(q, state, input_precision=PRECISION) * tl.exp(passed)[:, None]
    answer = tl.dot(scores.to(v.dtype), v, answer, input_precision=PRECISION)
    address = answers + (position * heads * P)[:, None] + column[None, :]
    tl.store(address, answer.to(v.dtype), mask=written)


@triton.jit
def _gradients_kernel(
    query, key, value, log_keep, before, behind, grad, grad_query, grad_key, grad_value, grad_log_keep, length, heads,
    query_batch, query_row, key_batch, key_row, value_batch, value_row, value_head, grad_batch, grad_row, grad_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, head after head: sums over the heads stay in registers."""
    chunk, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = chunk * C + tl.arange(0, C)
    row, column = tl.arange(0, D_BLOCK), tl.arange(0, P_BLOCK)
    written = (position < length)[:, None] & (column < P)[None, :]
    state_offset, known = row[:, None] * P + column[None, :], (row < D)[:, None] & (column < P)[None, :]
    query += batch * query_batch * ROW_UNIT
    key += batch * key_batch * ROW_UNIT
    value += batch * value_batch * ROW_UNIT
    grad += batch * grad_batch * ROW_UNIT
    q = _rows(query, position, length, query_row, D, D_BLOCK)
    k = _rows(key, position, length, key_row, D, D_BLOCK)
    dtype = q.dtype
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    grad_scores = tl.zeros([C, C], tl.float32)
    grad_q = tl.zeros([C, D_BLOCK], tl.float32)
    grad_k = tl.zeros([C, D_BLOCK], tl.float32)
    for head in range(heads):
        offset = ((batch * tl.cdiv(length, C) + chunk) * heads + head) * D * P + state_offset
        v = _rows(value + head * value_head * ROW_UNIT, position, length, value_row, P, P_BLOCK)
        g = _rows(grad + head * grad_head * ROW_UNIT, position, length, grad_row, P, P_BLOCK)
        passed, end = _kept(log_keep, batch, position, length, head, heads, C)
        since_start, until_end = tl.exp(passed)[:, None], tl.exp(end - passed)[:, None]
        decay = _decay(passed, C)

        grad_decayed = tl.dot(g, tl.trans(v), input_precision=PRECISION) * decay
        grad_scores += grad_decayed
        grad_decay = grad_decayed * scores  # gradient of the decay's logarithm
        grad_passed = tl.sum(grad_decay, axis=1) - tl.sum(grad_decay, axis=0)

        states = tl.load(before + offset, mask=known, other=0.0)
        asked = tl.dot(g, tl.trans(states), input_precision=PRECISION) * since_start
        grad_q += asked
        grad_passed += tl.sum(asked * q, axis=1)

        grad_states = tl.load(behind + offset, mask=known, other=0.0)
        held = tl.dot(v, tl.trans(grad_states), input_precision=PRECISION) * until_end
        grad_k += held
        grad_held = tl.sum(held * k, axis=1)
        kept = tl.sum(tl.sum(states.to(tl.float32) * grad_states.to(tl.float32), axis=1), axis=0) * tl.exp(end)
        # A gate acts on the scores and answers from its position on, and on what was held before it.
        grad_gate = tl.cumsum(grad_passed, axis=0, reverse=True) + tl.cumsum(grad_held, axis=0) - grad_held + kept
        address = (batch * length + position) * heads + head
        tl.store(grad_log_keep + address, grad_gate, mask=position < length)

        grad_v = tl.dot(k, grad_states, input_precision=PRECISION) * until_end
        grad_v = tl.dot(tl.trans((scores * decay).to(dtype)), g, grad_v, input_precision=PRECISION)
        tl.store(grad_value + (address * P)[:, None] + column[None, :], grad_v.to(dtype), mask=written)
    grad_scores = grad_scores.to(dtype)
    grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(grad_scores), q, grad_k, input_precision=PRECISION)
    address = ((batch * length + position) * D)[:, None] + row[None, :]
    written = (position < length)[:, None] & (row < D)[None, :]
    tl.store(grad_query + address, grad_q.to(dtype), mask=written)
    tl.store(grad_key + address, grad_k.to(dtype), mask=written)


def _in_rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor, copied only if its rows are not where the kernels want them, and its steps in units."""
    unit = ROW_UNIT.value
    if x.stride(-1) != 1 or any(step % unit for step in x.stride()[:-1]):
        x = x.contiguous()
    return x, [step // unit for step in x.stride()[:-1]]


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    """The kernels' sizes; blocks are powers of two, at least the 16 of a matrix product."""
    d, p = query.shape[-1], value.shape[-1]
    blocks = [max(16, triton.next_power_of_2(size)) for size in (d, p)]
    return {"C": SUMMARY_CHUNK, "D": d, "P": p, "D_BLOCK": blocks[0], "P_BLOCK": blocks[1]}


def _forward_shapes(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, p), d = value.shape, query.shape[-1]
    return (
        value.new_empty(batch, length, heads, p),
        value.new_empty(batch, (length + SUMMARY_CHUNK - 1) // SUMMARY_CHUNK, heads, d, p),
        log_keep.new_empty(batch, d, heads, p),
    )


@opaque(_forward_shapes)
def summary_forward(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answers [B, S, H, p]; states before each chunk [B, n, H, d, p]; the last state, float32 [B, d, H, p]."""
    answers, before, last = _forward_shapes(query, key, value, log_keep)
    (query, query_steps), (key, key_steps), (value, value_steps) = map(_in_rows, (query, key, value))
    batch, length, heads, p = value.shape
    log_keep = log_keep.contiguous()
    sizes = _sizes(query, value)
    columns = min(sizes["P_BLOCK"], STATE_COLUMNS)
    with torch.cuda.device_of(value):
        _states_kernel[(triton.cdiv(p, columns), heads, batch)](
            key, value, log_keep, last, before, length, heads, *key_steps, *value_steps,
            **(sizes | {"P_BLOCK": columns}), REVERSE=False, num_warps=4, num_stages=2,
        )  # fmt: skip
        _answers_kernel[(heads, before.shape[1], batch)](
            query, key, value, log_keep, before, answers, length, heads, *query_steps, *key_steps, *value_steps,
            **sizes, num_warps=4, num_stages=1,
        )  # fmt: skip
    return answers, before, last


def _backward_shapes(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, before: Tensor, grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = [x.new_empty(x.shape) for x in (query, key, value, log_keep)]
    return empty[0], empty[1], empty[2], empty[3]


@opaque(_backward_shapes)
def summary_backward(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, before: Tensor, grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_keep, from those of the answers and of the last state."""
    results = _backward_shapes(query, key, value, log_keep, before, grad, grad_last)
    behind = torch.empty_like(before)  # gradients of the states behind each chunk
    (query, query_steps), (key, key_steps), (value, value_steps), (grad, grad_steps) = map(
        _in_rows, (query, key, value, grad)
    )
    batch, length, heads, p = value.shape
    log_keep = log_keep.contiguous()
    sizes = _sizes(query, value)
    columns = min(sizes["P_BLOCK"], STATE_COLUMNS)
    with torch.cuda.device_of(value):
        _states_kernel[(triton.cdiv(p, columns), heads, batch)](
            query, grad, log_keep, grad_last.contiguous(), behind, length, heads, *query_steps, *grad_steps,
            **(sizes | {"P_BLOCK": columns}), REVERSE=True, num_warps=4, num_stages=2,
        )  # fmt: skip
        _gradients_kernel[(before.shape[1], batch)](
            query, key, value, log_keep, before, behind, grad, *results, length, heads,
            *query_steps, *key_steps, *value_steps, *grad_steps,
            **sizes, num_warps=8, num_stages=1,
        )  # fmt: skip
    return results


class _SummaryAttention(Function):
    """Keeps its inputs and the states before each chunk for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor]:
        answers, before, last = summary_forward(query, key, value, log_keep)
        ctx.save_for_backward(query, key, value, log_keep, before)
        return answers, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_answers: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        query, key, value, log_keep, before = ctx.saved_tensors
        return summary_backward(query, key, value, log_keep, before, grad_answers, grad_last)


def summary_attention(query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor]:
    """`decayed_attention` from state zero, for tensors that `fits` accepts; the answers are in the value's dtype."""
    answers, last = _SummaryAttention.apply(query, key, value, log_keep)
    return answers, last

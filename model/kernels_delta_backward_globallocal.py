"""Triton kernels of the gated delta rule's gradients; `kernels_delta_globallocal.py` launches them.

Whole operands of a tile would not fit into registers, since a product of float32 tiles takes each in two halves of its
digits: widths are gone through in parts.
"""

import triton
import triton.language as tl

from .kernels_summary_globallocal import PRECISION, ROW_UNIT, _decay, _kept, _rows

PART = tl.constexpr(32)  # of a width, at a time


@triton.jit
def _gate(gates, batch, position, length, head, heads):
    """A number per position [C] of [B, S, H]; 0 behind the sequence."""
    return tl.load(gates + (batch * length + position) * heads + head, mask=position < length, other=0.0)


@triton.jit
def _square(first, C: tl.constexpr):
    """Tile [C, C] that lies there row by row."""
    return tl.load(first + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _products(left, right, position, length, left_row, right_row, C: tl.constexpr, D: tl.constexpr):
    """Each row of the one times each of the other, [C, C]; a part of their width at a time, for want of registers."""
    sums = tl.zeros([C, C], tl.float32)
    for first in range(0, D, PART):
        a = _rows(left + first, position, length, left_row, D - first, PART)
        b = _rows(right + first, position, length, right_row, D - first, PART)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _states_backward_kernel(
    query, key, log_keep, write, inverses, grad, grad_last, behind, grad_solved, length, heads, shared,
    query_batch, query_row, query_head, key_batch, key_row, key_head, grad_batch, grad_row, grad_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind each chunk, and of the right sides of the triangular systems."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_column, chunks = tl.program_id(0) * P_BLOCK, tl.cdiv(length, C)
    rows, columns = tl.arange(0, D_BLOCK)[:, None], first_column + tl.arange(0, P_BLOCK)[None, :]
    known = (rows < D) & (columns < P)
    query += (batch * query_batch + head // shared * query_head) * ROW_UNIT
    key += (batch * key_batch + head // shared * key_head) * ROW_UNIT
    grad += (batch * grad_batch + head * grad_head) * ROW_UNIT + first_column
    inverses += (batch * chunks * heads + head) * C * C
    behind += (batch * chunks * heads + head) * D * P + rows * P + columns
    grad_solved += (batch * length * heads + head) * P + columns
    edge = grad_last + ((batch * heads + head) * D + rows) * P + columns
    state = tl.load(edge, mask=known, other=0.0)
    for i in range(chunks):
        chunk = chunks - 1 - tl.cast(i, tl.int64)
        tl.store(behind + chunk * heads * D * P, state, mask=known)
        position = chunk * C + tl.arange(0, C)
        passed, end = _kept(log_keep, batch, position, length, head, heads, C)
        share = tl.exp(passed)[:, None]
        gate = _gate(write, batch, position, length, head, heads)[:, None]
        k = _rows(key, position, length, key_row, D, D_BLOCK)
        g = _rows(grad, position, length, grad_row, P - first_column, P_BLOCK)
        scores = _products(query, key, position, length, query_row, key_row, C, D) * _decay(passed, C)
        update = tl.dot(k, state, input_precision=PRECISION) * tl.exp(end - passed)[:, None]
        update = tl.dot(tl.trans(scores), g, update, input_precision=PRECISION)
        inverse = _square(inverses + chunk * heads * C * C, C)
        solved = tl.dot(tl.trans(inverse), update, input_precision=PRECISION)
        written = (position < length)[:, None] & (columns < P)
        tl.store(grad_solved + position[:, None] * heads * P, solved, mask=written)
        q = _rows(query, position, length, query_row, D, D_BLOCK)
        state = tl.dot(tl.trans(q), g * share, state * tl.exp(end), input_precision=PRECISION)
        state = tl.dot(tl.trans(k), -gate * share * solved, state, input_precision=PRECISION)


@triton.jit
def _by_scores(
    value, updates, grad_solved, grad, grad_value, gate, position, length, address, value_row, grad_row,
    C: tl.constexpr, P: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's scores and of its system, before decay [C, C], and of the write gates by the values."""
    by_scores = tl.zeros([C, C], tl.float32)
    by_system = tl.zeros([C, C], tl.float32)
    by_value = tl.zeros([C], tl.float32)
    for first in range(0, P, P_BLOCK):
        column = first + tl.arange(0, P_BLOCK)[None, :]
        written = (position < length)[:, None] & (column < P)
        update = tl.load(updates + address + column, mask=written, other=0.0)
        g = _rows(grad + first, position, length, grad_row, P - first, P_BLOCK)
        by_scores = tl.dot(g, tl.trans(update), by_scores, input_precision=PRECISION)
        solved = tl.load(grad_solved + address + column, mask=written, other=0.0)
        by_system = tl.dot(solved, tl.trans(update), by_system, input_precision=PRECISION)
        v = _rows(value + first, position, length, value_row, P - first, P_BLOCK)
        by_value += tl.sum(solved * v, axis=1)
        tl.store(grad_value + address + column, solved * gate[:, None], mask=written)
    return by_scores, by_system, by_value


@triton.jit
def _by_states(
    states, updates, behind, grad_solved, grad, position, length, address, grad_row,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """A head's gradients by its states, before decay [C, D_BLOCK]: of the queries, of the keys as questions, of the
    keys as what is written under; and the product of the state and its gradient."""
    asked = tl.zeros([C, D_BLOCK], tl.float32)
    held = tl.zeros([C, D_BLOCK], tl.float32)
    added = tl.zeros([C, D_BLOCK], tl.float32)
    kept = 0.0
    row = tl.arange(0, D_BLOCK)[:, None]
    for first in range(0, P, P_BLOCK):
        column = first + tl.arange(0, P_BLOCK)[None, :]
        written, known = (position < length)[:, None] & (column < P), (row < D) & (column < P)
        update = tl.load(updates + address + column, mask=written, other=0.0)
        state_behind = tl.load(behind + row * P + column, mask=known, other=0.0)
        added = tl.dot(update, tl.trans(state_behind), added, input_precision=PRECISION)
        state = tl.load(states + row * P + column, mask=known, other=0.0)
        kept += tl.sum(tl.sum(state * state_behind, axis=1), axis=0)
        g = _rows(grad + first, position, length, grad_row, P - first, P_BLOCK)
        asked = tl.dot(g, tl.trans(state), asked, input_precision=PRECISION)
        solved = tl.load(grad_solved + address + column, mask=written, other=0.0)
        held = tl.dot(solved, tl.trans(state), held, input_precision=PRECISION)
    return asked, held, added, kept


@triton.jit
def _gradients_kernel(
    query, key, value, log_keep, write, states, updates, behind, grad_solved, grad,
    grad_query, grad_key, grad_value, grad_log_keep, grad_write, length, heads, shared,
    query_batch, query_row, query_head, key_batch, key_row, key_head,
    value_batch, value_row, value_head, grad_batch, grad_row, grad_head,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, head after head of those that share keys: sums over the heads stay in registers."""
    group, chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = chunk * C + tl.arange(0, C)
    query += (batch * query_batch + group * query_head) * ROW_UNIT
    key += (batch * key_batch + group * key_head) * ROW_UNIT
    grad_scores = tl.zeros([C, C], tl.float32)
    grad_overlap = tl.zeros([C, C], tl.float32)
    grad_q = tl.zeros([C, D_BLOCK], tl.float32)
    grad_k = tl.zeros([C, D_BLOCK], tl.float32)
    for head in range(group * shared, (group + 1) * shared):
        numbers = (batch * length + position) * heads + head
        state = ((batch * tl.cdiv(length, C) + chunk) * heads + head) * D * P
        g = grad + (batch * grad_batch + head * grad_head) * ROW_UNIT
        gate = _gate(write, batch, position, length, head, heads)
        passed, end = _kept(log_keep, batch, position, length, head, heads, C)
        by_scores, by_system, by_value = _by_scores(
            value + (batch * value_batch + head * value_head) * ROW_UNIT, updates, grad_solved, g, grad_value,
            gate, position, length, numbers[:, None] * P, value_row, grad_row, C, P, P_BLOCK,
        )  # fmt: skip
        decay = _decay(passed, C)
        by_scores *= decay
        by_system = tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], by_system * decay, 0.0)
        grad_scores += by_scores
        grad_overlap -= by_system * gate[:, None]
        scores = _products(query, key, position, length, query_row, key_row, C, D)
        overlap = _products(key, key, position, length, key_row, key_row, C, D)
        grad_passed = tl.sum(by_scores * scores, axis=1) - by_value * gate
        grad_gate = by_value - tl.sum(by_system * overlap, axis=1)

        asked, held, added, kept = _by_states(
            states + state, updates, behind + state, grad_solved, g, position, length, numbers[:, None] * P,
            grad_row, C, D, P, D_BLOCK, P_BLOCK,
        )  # fmt: skip
        share, until_end = tl.exp(passed)[:, None], tl.exp(end - passed)[:, None]
        q = _rows(query, position, length, query_row, D, D_BLOCK)
        k = _rows(key, position, length, key_row, D, D_BLOCK)
        grad_q += asked * share
        grad_k += added * until_end - held * share * gate[:, None]
        grad_passed += tl.sum(asked * share * q, axis=1)
        grad_gate -= tl.sum(held * share * k, axis=1)
        kept = kept * tl.exp(end) + tl.sum(tl.sum(added * until_end * k, axis=1), axis=0)  # of the state behind
        tl.store(grad_write + numbers, grad_gate, mask=position < length)
        grad_passed = tl.cumsum(grad_passed, axis=0, reverse=True) + kept
        tl.store(grad_log_keep + numbers, grad_passed, mask=position < length)
    q = _rows(query, position, length, query_row, D, D_BLOCK)
    k = _rows(key, position, length, key_row, D, D_BLOCK)
    grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(grad_scores), q, grad_k, input_precision=PRECISION)
    grad_k = tl.dot(grad_overlap + tl.trans(grad_overlap), k, grad_k, input_precision=PRECISION)
    row, column = (batch * length + position) * (heads // shared) + group, tl.arange(0, D_BLOCK)[None, :]
    written = (position < length)[:, None] & (column < D)
    tl.store(grad_query + row[:, None] * D + column, grad_q, mask=written)
    tl.store(grad_key + row[:, None] * D + column, grad_k, mask=written)

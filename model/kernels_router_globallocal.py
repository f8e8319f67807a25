"""Triton kernels of the routers: the k best rows of a table, and sums over the tokens that chose a row.

No atomic additions and no timing of candidates: the same inputs give the same bits in every process.

Bytes moved through device memory for T = 65,536 tokens, N = 4,096 rows of width R = 128, k = 2, bfloat16:

| | written out | here |
|---|---|---|
| scores of all rows | 2·T·N bytes written, read twice: 1.6 GB | T·R·2 read, T·k·12 written: 18 MB |
| sums by row at width c = 512 | gathered copies T·k·c·2 written and read: 0.4 GB | T·k·c·2 read: 0.13 GB |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration_globallocal import PIECE_ENTRIES

LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _top_rows_kernel(
    tokens, table, bias, out_values, out_indices, num_tokens, num_rows, width,
    K: tl.constexpr, K_PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    channel, slot = tl.arange(0, WIDTH), tl.arange(0, K_PADDED)
    token_address = tokens + token[:, None] * width + channel[None, :]
    x = tl.load(token_address, mask=inside[:, None] & (channel < width)[None, :], other=0.0)
    # The k best so far, in any order; slots beyond k are never the smallest.
    best = tl.where(slot[None, :] < K, LOWEST, HIGHEST) + tl.zeros([TOKENS, K_PADDED], tl.int32)
    place = tl.zeros([TOKENS, K_PADDED], tl.int32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        row_address = table + row[None, :].to(tl.int64) * width + channel[:, None]
        scores = tl.zeros([TOKENS, ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            shift = part * WIDTH
            known = (channel + shift) < width
            if PARTS > 1:
                x = tl.load(token_address + shift, mask=inside[:, None] & known[None, :], other=0.0)
            keys = tl.load(row_address + shift, mask=(row < num_rows)[None, :] & known[:, None], other=0.0)
            scores = tl.dot(x, keys, scores, input_precision=PRECISION)
        scores += tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)[None, :]
        scores = tl.where((row < num_rows)[None, :], scores, float("-inf"))
        # A score's bits, ordered as a signed integer, with the column in place of its last ones: one plain maximum
        # finds both.
        bits = scores.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (ordered & -ROWS) | (ROWS - 1 - tl.arange(0, ROWS))[None, :]
        for _ in tl.static_range(K):
            largest = tl.max(packed, axis=1)
            smallest = tl.min(best, axis=1)
            better = (largest & -ROWS) > (smallest & -ROWS)
            # Of equal ones the last slot goes; slots are told apart by their rows.
            replaced = better[:, None] & (best == smallest[:, None]) & (slot[None, :] < K)
            first = tl.min(tl.where(replaced, slot[None, :], K_PADDED), axis=1)
            replaced = slot[None, :] == first[:, None]
            best = tl.where(replaced, largest[:, None], best)
            place = tl.where(replaced, start + ROWS - 1 - (largest & (ROWS - 1))[:, None], place)
            packed = tl.where(packed == largest[:, None], LOWEST, packed)
    best = tl.where(slot[None, :] < K, best, LOWEST)
    for j in tl.static_range(K):
        # Equal scores: the earlier row first.
        largest = tl.max(best & -ROWS, axis=1)
        candidates = ((best & -ROWS) == largest[:, None]) & (slot[None, :] < K)
        index = tl.min(tl.where(candidates, place, 0x7FFFFFFF), axis=1)
        chosen = candidates & (place == index[:, None])
        value = largest ^ ((largest >> 31) & 0x7FFFFFFF)
        tl.store(out_values + token * K + j, value.to(tl.float32, bitcast=True).to(out_values.dtype.element_ty), inside)
        tl.store(out_indices + token * K + j, index.to(tl.int64), mask=inside)
        best = tl.where(chosen, LOWEST, best)


def top_rows_by_kernel(tokens: Tensor, table: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [T, k], in the dtype of the tokens, and int64 indices of the k largest of `tokens @ table.T + bias`.

    Scores are summed in float32 and compared to 17 of its 23 binary digits; of equal ones the earlier row comes first.
    tokens [T, R], table [N, R], bias [N].
    """
    num_tokens, width = tokens.shape
    values = tokens.new_empty(num_tokens, k)
    indices = torch.empty(num_tokens, k, dtype=torch.int64, device=tokens.device)
    channels = max(16, min(128, triton.next_power_of_2(width)))
    if width % channels and width % 64 == 0:
        channels = 64
    block = 128 if tokens.element_size() == 2 else 64
    _top_rows_kernel[(triton.cdiv(num_tokens, block),)](
        tokens.contiguous(), table.contiguous(), bias, values, indices, num_tokens, table.shape[0], width,
        K=k, K_PADDED=triton.next_power_of_2(k), TOKENS=block, ROWS=64, WIDTH=channels,
        PARTS=triton.cdiv(width, channels), PRECISION="ieee", num_warps=8 if block == 128 else 4, num_stages=2,
    )  # fmt: skip
    return values, indices


@triton.jit
def _mix_kernel(
    weights, table, indices, out, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = token < num_tokens
    known = inside[:, None] & (channel < width)[None, :]
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(weights + token * K + j, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(indices + token * K + j, mask=inside, other=0)
        rows = tl.load(table + row[:, None] * width + channel[None, :], mask=known, other=0.0)
        total += weight[:, None] * rows.to(tl.float32)
    tl.store(out + token[:, None] * width + channel[None, :], total.to(out.dtype.element_ty), mask=known)


def mix_by_kernel(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[t, j] · table[indices[t, j]] for every t: [T, c], summed in float32."""
    (num_tokens, k), width = indices.shape, table.shape[1]
    out = table.new_empty(num_tokens, width)
    channels = min(256, max(16, triton.next_power_of_2(width)))
    _mix_kernel[(triton.cdiv(num_tokens, 16), triton.cdiv(width, channels))](
        weights.contiguous(), table.contiguous(), indices.contiguous(), out, num_tokens, width,
        K=k, TOKENS=16, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _dot_kernel(
    tokens, table, indices, out, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    for j in tl.static_range(K):
        row = tl.load(indices + token * K + j, mask=inside, other=0)
        total = tl.zeros([TOKENS], tl.float32)
        for start in range(0, width, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            known = inside[:, None] & (channel < width)[None, :]
            x = tl.load(tokens + token[:, None] * width + channel[None, :], mask=known, other=0.0)
            rows = tl.load(table + row[:, None] * width + channel[None, :], mask=known, other=0.0)
            total += tl.sum(x.to(tl.float32) * rows.to(tl.float32), axis=1)
        tl.store(out + token * K + j, total.to(out.dtype.element_ty), mask=inside)


def dot_by_kernel(table: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    """tokens[t] · table[indices[t, j]] for every t, j: [T, k], summed in float32."""
    (num_tokens, k), width = indices.shape, table.shape[1]
    out = table.new_empty(num_tokens, k)
    channels = min(256, max(16, triton.next_power_of_2(width)))
    _dot_kernel[(triton.cdiv(num_tokens, 16),)](
        tokens.contiguous(), table.contiguous(), indices.contiguous(), out, num_tokens, width,
        K=k, TOKENS=16, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _sum_pieces_kernel(
    values, tokens, order, row_starts, piece_rows, piece_starts, partial, partial_totals, num_rows, width, choices,
    HAS_TOKENS: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    row = tl.load(piece_rows + piece)
    if row < num_rows:
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        first = tl.load(row_starts + row) + (piece - tl.load(piece_starts + row)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(row_starts + row + 1))
        sums, totals = tl.zeros([CHANNELS], tl.float32), tl.zeros([ENTRIES], tl.float32)
        for at in range(0, PIECE, ENTRIES):
            entry = first + at + tl.arange(0, ENTRIES)
            choice = tl.load(order + entry, mask=entry < last, other=0)
            value = tl.load(values + choice, mask=entry < last, other=0.0).to(tl.float32)
            totals += value
            if HAS_TOKENS:
                address = tokens + (choice // choices)[:, None] * width + channel[None, :]
                known = (entry < last)[:, None] & (channel < width)[None, :]
                sums += tl.sum(tl.load(address, mask=known, other=0.0).to(tl.float32) * value[:, None], axis=0)
        if HAS_TOKENS:
            tl.store(partial + piece.to(tl.int64) * width + channel, sums, mask=channel < width)
        if tl.program_id(1) == 0:
            tl.store(partial_totals + piece, tl.sum(totals, axis=0))


@triton.jit
def _sum_rows_kernel(
    partial, partial_totals, piece_starts, sums, totals, width,
    HAS_TOKENS: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, last = tl.load(piece_starts + row), tl.load(piece_starts + row + 1)
    sum_, total = tl.zeros([CHANNELS], tl.float32), tl.zeros([PIECES], tl.float32)
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        total += tl.load(partial_totals + piece, mask=piece < last, other=0.0)
        if HAS_TOKENS:
            known = (piece < last)[:, None] & (channel < width)[None, :]
            address = partial + piece.to(tl.int64)[:, None] * width + channel[None, :]
            sum_ += tl.sum(tl.load(address, mask=known, other=0.0), axis=0)
    if HAS_TOKENS:
        tl.store(sums + row.to(tl.int64) * width + channel, sum_.to(sums.dtype.element_ty), mask=channel < width)
    if tl.program_id(1) == 0:
        tl.store(totals + row, tl.sum(total, axis=0).to(totals.dtype.element_ty))


def sum_by_row_by_kernel(
    values: Tensor, tokens: Tensor | None, order: Tensor, row_starts: Tensor, piece_starts: Tensor, piece_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the choices of each row: of `values` [T, k] times their token's row of `tokens` [T, c], and alone.

    A row is cut into pieces of `PIECE_ENTRIES` choices, a program each; a second kernel adds a row's pieces.

    Args:
        order: int64 [T·k], the choices sorted by row, in the order of the tokens within a row.
        row_starts: int64 [N + 1], where each row begins in `order`.
        piece_starts: int64 [N + 1], a row's first piece.
        piece_rows: int64, the row of each piece; N for those that there are not.

    Returns:
        [N, c], or [N, 0] without tokens, and [N], in the dtypes of the tokens and the values.
    """
    rows, choices, most = row_starts.numel() - 1, values.shape[1], piece_rows.numel()
    width = 0 if tokens is None else tokens.shape[1]
    channels = min(256, max(16, triton.next_power_of_2(max(width, 1))))
    columns = max(1, triton.cdiv(width, channels))
    partial = torch.empty(most * width + most, dtype=torch.float32, device=order.device)
    sums = (values if tokens is None else tokens).new_empty(rows, width)
    totals = values.new_empty(rows)
    arguments = {"HAS_TOKENS": tokens is not None, "CHANNELS": channels, "num_warps": 4}
    _sum_pieces_kernel[(most, columns)](
        values.contiguous(), values if tokens is None else tokens.contiguous(), order, row_starts, piece_rows,
        piece_starts, partial, partial[most * width :], rows, width, choices,
        PIECE=PIECE_ENTRIES, ENTRIES=16, **arguments,
    )  # fmt: skip
    _sum_rows_kernel[(rows, columns)](
        partial, partial[most * width :], piece_starts, sums, totals, width, PIECES=16, **arguments
    )
    return sums, totals

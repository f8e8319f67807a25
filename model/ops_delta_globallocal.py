"""The gated delta rule in chunks: a triangular system inside each, and one state between them.

Plain torch, in float32 or wider, on every device. Shapes and symbols as in `configuration_globallocal.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .configuration_globallocal import SUMMARY_CHUNK
from .library_globallocal import exporting


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """answer[t] = query[t] · state[t]; a state keeps a share, then what it holds under a key moves towards the value:

        kept[t] = keep[t] · state[t − 1]
        state[t] = kept[t] + write[t] · key[t] ⊗ (value[t] − key[t] · kept[t])

    What the positions of a chunk add is written with what the earlier ones added, a triangular system; it is solved
    for all chunks at once, and only the chunks' states follow one another (the WY form, arXiv:2412.06464, section 3).
    Arguments and results are those of `fla.ops.gated_delta_rule.chunk_gated_delta_rule(query, key, value, g=log_keep,
    beta=write, scale=1.0, initial_state=state, output_final_state=True)`.

    Args:
        query, key: [B, S, G, d], keys of length 1 or less. Each of the G serves H / G neighbouring heads.
        value: [B, S, H, p].
        log_keep: [B, S, H], logarithms of the shares kept, at most 0.
        write: [B, S, H], from 0 (nothing) to 1 (what is held under the key becomes the value).
        state: [B, H, d, p] before the first position, or None for zeros.

    All are of one dtype, float32 or wider.

    Returns:
        Answers [B, S, H, p], and the last state [B, H, d, p].
    """
    length, groups = query.shape[1], query.shape[2]
    heads = value.shape[2]
    if exporting():
        return _one_by_one(query, key, value, log_keep, write, state)
    size = min(SUMMARY_CHUNK, 1 << (length - 1).bit_length())
    if missing := -length % size:  # steps that change nothing
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
        log_keep, write = (F.pad(x, (0, 0, 0, missing)) for x in (log_keep, write))

    def chunks(x: Tensor) -> Tensor:  # [B, S, H or G, …] → [B, n, H or G, C, …]
        return x.unflatten(1, (-1, size)).transpose(2, 3)

    def for_heads(x: Tensor) -> Tensor:  # [B, n, G, …] → [B, n, H, …]
        return x if groups == heads else x.repeat_interleave(heads // groups, dim=2)

    query, key, value, log_keep, write = (chunks(x) for x in (query, key, value, log_keep, write))
    passed = log_keep.cumsum(dim=-1)  # [B, n, H, C], from the chunk's start
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    decay = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    same = key.transpose(-1, -2)
    scores = for_heads(query @ same) * decay
    overlap = for_heads(key @ same) * decay * write.unsqueeze(-1)  # what of a value the chunk's earlier ones hold
    query, key = for_heads(query), for_heads(key)

    share, write = passed.exp().unsqueeze(-1), write.unsqueeze(-1)
    inverse = unit_inverse(overlap)
    added, held = inverse @ (value * write), inverse @ (key * (write * share))  # [B, n, H, C, p], [B, n, H, C, d]
    until_end = (key * (passed[..., -1:] - passed).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = share[..., -1:, :]  # of the state, by a whole chunk: [B, n, H, 1, 1]
    if state is None:
        state = value.new_zeros(value.shape[0], heads, key.shape[-1], value.shape[-1])
    before, update, state = _chain((added, held, kept, until_end), state)
    answer = (query * share) @ before + scores @ update
    return answer.transpose(2, 3).flatten(1, 2)[:, :length], state


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, write: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` as its equations say it, for graphs of any length: they loop over the positions."""
    from torch._higher_order_ops.scan import scan  # here alone: no face of torch has it yet

    heads = value.shape[2]
    query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    if state is None:
        state = value.new_zeros(value.shape[0], heads, key.shape[-1], value.shape[-1])

    def step(state: Tensor, position: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        query, key, value, keep, write = position  # [B, H, d or p], [B, H]
        kept = keep[..., None, None] * state
        held = (key.unsqueeze(-2) @ kept).squeeze(-2)
        state = kept + key.unsqueeze(-1) * (write.unsqueeze(-1) * (value - held)).unsqueeze(-2)
        return state, (query.unsqueeze(-2) @ state).squeeze(-2)

    positions = tuple(x.transpose(0, 1) for x in (query, key, value, log_keep.exp(), write))
    state, answers = scan(step, state, positions)
    return answers.transpose(0, 1), state


def _chain(parts: tuple[Tensor, Tensor, Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states in front of the chunks, what their positions add, and the last state: the one loop that is left."""
    states, updates = [], []
    for added, held, kept, until_end in zip(*(part.unbind(1) for part in parts), strict=True):
        states.append(state)
        updates.append(added - held @ state)
        state = kept * state + until_end @ updates[-1]
    return torch.stack(states, dim=1), torch.stack(updates, dim=1), state


class _UnitInverse(Function):
    """Exact in few steps: small blocks by their powers, which end, then blocks of twice the size at a time."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        size = matrix.shape[-1]
        block = min(8, size)
        one = torch.eye(block, dtype=matrix.dtype, device=matrix.device)
        power = -_diagonal_blocks(matrix, block).tril(-1)  # N; (1 − N)⁻¹ = (1 + N)(1 + N²)(1 + N⁴), as N⁸ is 0
        small = one + power
        for _ in range(2):
            power = power @ power
            small = small + small @ power
        inverse = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
        _diagonal_blocks(inverse, block).copy_(small)
        while block < size:  # [[1, 0], [x, 1]]⁻¹ = [[1, 0], [−x, 1]], of matrices in place of numbers too
            below = _diagonal_blocks(matrix, 2 * block)[..., block:, :block]
            mine = _diagonal_blocks(inverse, 2 * block)
            first, second = mine[..., :block, :block], mine[..., block:, block:]
            mine[..., block:, :block] = -(second @ below @ first)
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grad @ turned).tril(-1)


def _diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """A view [..., C / block, block, block] of matrix [..., C, C]."""
    cut = (-1, block)
    return matrix.unflatten(-1, cut).unflatten(-3, cut).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def unit_inverse(matrix: Tensor) -> Tensor:
    """The inverse of 1 + the strictly lower triangle of matrix [..., C, C], C a power of two; the rest is not read."""
    return _UnitInverse.apply(matrix)

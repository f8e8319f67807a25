"""The gated delta rule in chunks: a triangular system inside each, and one state between them.

Plain torch stands here, in float32 or wider, with a backward pass of its own; on a GPU the kernels of
`kernels_delta_globallocal.py` do the same where Triton is installed. Shapes and symbols as in
`configuration_globallocal.py`, and here n chunks of C positions, J = B · G groups of heads that share keys, E = H / G
heads in each. What many heads ask of one key is one product: [C, d] · [d, E · p].
"""

from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .configuration_globallocal import SUMMARY_CHUNK
from .library_globallocal import exporting, has_kernels

with suppress(ImportError):  # without Triton `has_kernels` is false; by its name, so that the file travels with exports
    from .kernels_delta_globallocal import delta_attention, fits

INVERSE_BLOCK = 16  # what a solver inverts at once


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor,
    write: Tensor,
    state: Tensor | None,
    starts: Tensor | None = None,
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
        starts: bool [B, S], where the state before is forgotten; None for nowhere.

    All others are of one dtype, float32 or wider.

    Returns:
        Answers [B, S, H, p], and the last state [B, H, d, p].
    """
    length = query.shape[1]
    if exporting():
        keep = log_keep.exp()
        keep = keep if starts is None else keep.masked_fill(starts.unsqueeze(-1), 0)
        return _one_by_one(query, key, value, keep, write, state)
    parts = (query, key, value, log_keep, write)
    if has_kernels(query) and state is None and starts is None and length > 1 and fits(*parts):
        return delta_attention(*parts)
    size = min(SUMMARY_CHUNK, 1 << (length - 1).bit_length())
    if missing := -length % size:  # steps that change nothing
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
        log_keep, write = (F.pad(x, (0, 0, 0, missing)) for x in (log_keep, write))
        starts = None if starts is None else F.pad(starts, (0, missing))
    if state is None:
        state = value.new_zeros(value.shape[0], value.shape[2], query.shape[3], value.shape[3])
    answer, state = _DeltaRule.apply(query, key, value, log_keep, write, state, starts, size)
    return answer[:, :length], state


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, write: Tensor, state: Tensor | None
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

    positions = tuple(x.transpose(0, 1) for x in (query, key, value, keep, write))
    state, answers = scan(step, state, positions)
    return answers.transpose(0, 1), state


class _Kept(NamedTuple):
    """What the backward pass reads again. Behind the chunks, [n, J, …]:"""

    both: Tensor  # [2, C, d], queries and keys
    value: Tensor  # [C, E, p]
    write: Tensor  # [E, C]
    share: Tensor  # [E, C], what is left, at each position, of the state before the chunk
    decay: Tensor  # [E, C, C], what is left of an earlier position's writing
    scores: Tensor  # [E, C, C], queries · keys, decayed
    overlap: Tensor  # [C, C], keys · keys
    inverse: Tensor  # [E, C, C]
    said: Tensor  # [2, C, E, p], what the state before the chunk holds under queries and keys
    update: Tensor  # [E, C, p], what each position writes
    until_end: Tensor  # [C, E, p], and what is left of it at the chunk's end
    states: Tensor  # [d, E, p], before each chunk and behind the last: [n + 1, J, …]
    answer: Tensor  # [C, E, p]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor,
    write: Tensor,
    state: Tensor,
    starts: Tensor | None,
    size: int,
) -> tuple[tuple[Tensor, Tensor], _Kept]:
    """Arguments and results of `gated_delta_rule` for a length that is a multiple of `size`, and what to keep."""
    batch, length, groups, _ = key.shape
    heads, n = value.shape[2] // groups, length // size
    rows, by_head = (n, batch * groups, size, heads, -1), (2, 3)
    both = torch.stack([_by_chunk(x, size, groups) for x in (query, key)], dim=2)
    value = _by_chunk(value.flatten(2), size, groups).view(rows)
    log_keep, write = (_by_chunk(x, size, groups).transpose(2, 3) for x in (log_keep, write))
    passed, write = log_keep.cumsum(dim=-1), write.contiguous()
    decay, share = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).exp_().tril_(), passed.exp()
    if starts is not None:
        begun = starts.view(batch, n, size).transpose(0, 1).cumsum(dim=-1)  # 0 in what goes on from before the chunk
        begun = begun.repeat_interleave(groups, dim=1).unsqueeze(2)  # [n, J, 1, C]
        decay.masked_fill_(begun.unsqueeze(-1) != begun.unsqueeze(-2), 0)
        share.masked_fill_(begun > 0, 0)
    key = both[:, :, 1]
    products = (both.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (2, size))
    scores, overlap = products[:, :, :1] * decay, products[:, :, 1]
    inverse = unit_inverse((overlap.unsqueeze(2) * decay).mul_(write.unsqueeze(-1)))

    until_end = decay[..., -1, :]
    kept = share[..., -1].view(n, -1, 1, heads, 1)  # of the state, by a whole chunk
    held_share = -(write * share).unsqueeze(-1)
    wanted = (value.transpose(*by_head) * write.unsqueeze(-1)).contiguous()
    states: list[Tensor] = [_by_group(state, groups)]
    asked: list[Tensor] = []
    solved: list[Tensor] = []
    left: list[Tensor] = []
    for i in range(n):
        asked.append((both[i].flatten(1, 2) @ states[i].flatten(2)).view(-1, 2, size, heads, wanted.shape[-1]))
        solved.append(inverse[i] @ torch.addcmul(wanted[i], held_share[i], asked[i][:, 1].transpose(1, 2)))
        left.append((solved[i] * until_end[i].unsqueeze(-1)).transpose(1, 2).contiguous())
        before = (states[i] * kept[i]).flatten(2)
        behind = torch.baddbmm(before, key[i].transpose(-1, -2), left[i].flatten(2))
        states.append(behind.view_as(states[i]))
    said, update, written, all_states = (torch.stack(parts) for parts in (asked, solved, left, states))
    inside, share_by_time = (x.transpose(*by_head) for x in (scores @ update, share.unsqueeze(-1)))
    answer = torch.addcmul(inside, said[:, :, 0], share_by_time)
    results = _by_time(answer.flatten(3), batch).reshape(batch, length, -1, wanted.shape[-1])
    parts = (both, value, write, share, decay, scores, overlap, inverse, said, update, written, all_states, answer)
    return (results, _by_head(states[n], groups)), _Kept(*parts)


class _DeltaRule(Function):
    """With decays as numbers of each position, the gradients of their logarithms are Σ answer · its gradient less
    Σ value · its gradient, summed over all later positions: what a decay takes from, it takes from both alike."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        results, kept = _forward(*arguments)
        ctx.save_for_backward(*kept)
        return results

    @staticmethod
    def backward(ctx: Any, grad_answer: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(_Kept(*ctx.saved_tensors), grad_answer, grad_state), None, None


def _backward(kept: _Kept, grad_answer: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the six tensors, from those of answers and last state."""
    both, value, write, share, decay, _, overlap, _, said, update, written, states, answer = kept
    groups, size = both.shape[1], both.shape[3]
    width, batch = value.shape[4], len(grad_answer)
    by_head, per_batch = (2, 3), groups // batch
    grad_answer = _by_chunk(grad_answer.flatten(2), size, per_batch).view_as(value)
    key = both[:, :, 1]
    share = share.unsqueeze(-1)
    grad_by_head = grad_answer.transpose(*by_head).contiguous()
    asked = grad_answer * share.transpose(*by_head)
    grad_first, grad_states, grad_said, grad_new = _walk_back(
        kept, asked, grad_by_head, _by_group(grad_state, per_batch)
    )

    answered = update.transpose(-1, -2)
    grad_scores = (grad_by_head @ answered).mul_(decay)
    grad_overlap = (grad_new @ answered).mul_(decay)  # less than nothing, and of earlier positions alone
    grad_overlap.diagonal(dim1=-2, dim2=-1).zero_()
    by_write = (grad_overlap * overlap.unsqueeze(2)).sum(dim=-1)
    of_heads = [grad_scores.sum(dim=2), grad_overlap.mul_(write.unsqueeze(-1)).sum(dim=2).neg_()]
    grad_products = torch.cat(of_heads, dim=2).flatten(0, 1)  # [n · J, 2 · C, C]
    grad_said, before = grad_said.flatten(0, 1), states[:-1].flatten(0, 1).flatten(2)
    grad_both = torch.baddbmm(grad_products @ key.flatten(0, 1), grad_said, before.transpose(-1, -2))
    grad_query, grad_key = grad_both.view_as(both).unbind(2)
    grad_key = grad_products.transpose(-1, -2) @ both.view(len(grad_products), 2 * size, -1) + grad_key.flatten(0, 1)
    grad_key.baddbmm_(written.flatten(0, 1).flatten(2), grad_states.flatten(0, 1).flatten(2).transpose(-1, -2))
    grad_key = grad_key.view_as(key)

    value = value.transpose(*by_head)
    wrong = torch.addcmul(value, share, said[:, :, 1].transpose(*by_head), value=-1)
    grad_write = (grad_new * wrong).sum(dim=-1) - by_write
    grad_value = grad_new * write.unsqueeze(-1)
    grad_passed = (grad_answer * answer).sum(dim=-1).transpose(2, 3) - (grad_value * value).sum(dim=-1)
    grad_passed[..., -1] += (grad_states * states[1:]).sum(dim=(2, 4))
    grad_keep = grad_passed.flip(-1).cumsum(dim=-1).flip(-1)

    def numbers(x: Tensor) -> Tensor:  # [n, J, E, C] → [B, S, H]
        return _by_time(x.transpose(2, 3), batch).flatten(2)

    grad_value = _by_time(grad_value.transpose(*by_head).flatten(3), batch).flatten(2).unflatten(2, (-1, width))
    parts = (_by_time(grad_query, batch), _by_time(grad_key, batch), grad_value)
    return *parts, numbers(grad_keep), numbers(grad_write), _by_head(grad_first, per_batch)


def _walk_back(kept: _Kept, asked: Tensor, grad_answer: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Through the chunks, from the last to the first.

    Args:
        asked: [n, J, C, E, p], gradients of what the states said under the queries.
        grad_answer: [n, J, E, C, p].
        grad_state: [J, d, E, p], of the last state.

    Returns:
        Gradients of the first state, of the states behind each chunk [n, …], of what the states said under queries and
        keys [n, J, 2 · C, E · p], and of what was solved for, before its write gates, [n, J, E, C, p].
    """
    both, value = kept.both, kept.value
    n, groups, _, size, _ = both.shape
    share, until_end = kept.share.unsqueeze(-1), kept.decay[..., -1, :].unsqueeze(-1)
    left = share[..., -1:, :].view(n, groups, 1, value.shape[3], 1)
    held_share = -share * kept.write.unsqueeze(-1)
    grad_update, turned = kept.scores.transpose(-1, -2) @ grad_answer, kept.inverse.transpose(-1, -2)
    grad_states, grad_said, grad_new = [grad_state], [], []  # from the end
    for i in range(n - 1, -1, -1):
        behind = (both[i, :, 1] @ grad_states[-1].flatten(2)).view_as(value[i])
        grad_new.append(turned[i] @ torch.addcmul(grad_update[i], until_end[i], behind.transpose(1, 2)))
        held = (grad_new[-1] * held_share[i]).transpose(1, 2)
        grad_said.append(torch.stack([asked[i], held], dim=1).view(groups, 2 * size, -1))
        before = (grad_states[-1] * left[i]).flatten(2)
        before = torch.baddbmm(before, both[i].flatten(1, 2).transpose(-1, -2), grad_said[-1])
        grad_states.append(before.view_as(grad_states[-1]))
    first = grad_states.pop()
    return first, *(torch.stack(parts[::-1]) for parts in (grad_states, grad_said, grad_new))


def _by_chunk(x: Tensor, size: int, groups: int) -> Tensor:
    """[B, S, …] → [n, J, C, …/G]."""
    batch, length = x.shape[:2]
    return x.reshape(batch, length // size, size, groups, -1).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _by_time(x: Tensor, batch: int) -> Tensor:
    """[n, J, C, c] → [B, S, G, c]."""
    return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _by_group(state: Tensor, groups: int) -> Tensor:
    """[B, H, d, p] → [J, d, E, p]."""
    return state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1)


def _by_head(state: Tensor, groups: int) -> Tensor:
    """[J, d, E, p] → [B, H, d, p]."""
    return state.unflatten(0, (-1, groups)).transpose(2, 3).flatten(1, 2)


def unit_inverse(matrix: Tensor) -> Tensor:
    """The inverse of 1 + the strictly lower triangle of matrix [..., C, C], C a power of two; the rest is not read.

    Small blocks are solved, then blocks of twice the size have the inverse [[1, 0], [x, 1]]⁻¹ = [[1, 0], [−x, 1]], of
    matrices in place of numbers too.
    """
    size = matrix.shape[-1]
    block = min(INVERSE_BLOCK, size)
    one = torch.eye(block, dtype=matrix.dtype, device=matrix.device)
    blocks = _diagonal_blocks(matrix, block)
    inverse = torch.linalg.solve_triangular(blocks, one.expand_as(blocks), upper=False, unitriangular=True)
    while block < size:
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        below = _diagonal_blocks(matrix, 2 * block)[..., block:, :block]
        inverse = first.new_zeros(*first.shape[:-2], 2 * block, 2 * block)
        inverse[..., :block, :block], inverse[..., block:, block:] = first, second
        inverse[..., block:, :block] = -(second @ below @ first)
        block *= 2
    return inverse.squeeze(-3)


def _diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """A view [..., C / block, block, block] of matrix [..., C, C]."""
    cut = (-1, block)
    return matrix.unflatten(-1, cut).unflatten(-3, cut).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

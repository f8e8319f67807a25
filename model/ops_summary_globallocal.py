"""The running summary's recurrence, in chunks: an attention inside each, and one state between them.

Plain torch stands here; on a GPU the kernels of `kernels_summary_globallocal.py` do the same where Triton is installed.
"""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .configuration_globallocal import SUMMARY_CHUNK
from .library_globallocal import exporting, has_kernels

with suppress(ImportError):  # without Triton `has_kernels` is false; by its name, so that the file travels with exports
    from .kernels_summary_globallocal import fits, summary_attention

SCAN_CHUNK = 8  # steps that the chunks of a linear recurrence take side by side


def _scan(decay: Tensor, update: Tensor, reverse: bool = False) -> Tensor:
    """state[t] = decay[t] · state[t − 1] + update[t] from state 0, [B, S, c]; reversed, from t + 1 instead.

    All chunks step along side by side; then the chunks' last states are scanned the same way, and what was there
    before a chunk is added to it. So the data are passed over a few times, however long the sequence.
    """
    length = update.shape[1]
    if length == 1:
        return update
    num_chunks = -(-length // SCAN_CHUNK)
    missing = num_chunks * SCAN_CHUNK - length
    padding = (0, 0, missing, 0) if reverse else (0, 0, 0, missing)  # where the scan ends
    decay, state = (F.pad(x, padding).unflatten(1, (num_chunks, SCAN_CHUNK)) for x in (decay, update))
    passed = decay.clone()  # the share of what was before the chunk
    steps = range(SCAN_CHUNK - 1, -1, -1) if reverse else range(SCAN_CHUNK)
    for previous, t in pairwise(steps):
        state[:, :, t].addcmul_(decay[:, :, t], state[:, :, previous])
        passed[:, :, t].mul_(passed[:, :, previous])
    if num_chunks > 1:
        ends = _scan(passed[:, :, t].contiguous(), state[:, :, t].contiguous(), reverse)
        into, before = (slice(None, -1), ends[:, 1:]) if reverse else (slice(1, None), ends[:, :-1])
        state[:, into].addcmul_(passed[:, into], before.unsqueeze(2))
    state = state.flatten(1, 2)
    return state[:, missing:] if reverse else state[:, :length]


class _LinearRecurrence(Function):
    """The gradient of a linear recurrence is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor) -> Tensor:
        state = _scan(decay, update)
        ctx.save_for_backward(decay, state)
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decay, state = ctx.saved_tensors
        later_decay = F.pad(decay[:, 1:], (0, 0, 0, 1))
        grad_update = _scan(later_decay, grad, reverse=True)
        return grad_update * F.pad(state[:, :-1], (0, 0, 1, 0)), grad_update


def linear_recurrence(decay: Tensor, update: Tensor) -> Tensor:
    """state[t] = decay[t] · state[t − 1] + update[t] along dimension 1, from state 0: [B, S, c] each.

    Decays in [0, 1] keep every intermediate product there: nothing is divided.
    """
    return _LinearRecurrence.apply(decay, update)


def decayed_attention(
    query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """answer[t] = query[t] · state[t], state[t] = keep[t] · state[t − 1] + key[t] ⊗ value[t], a state a head.

    In chunks: inside one the answers are an attention with decaying scores, and what was before it is one state.
    (State space duality, https://arxiv.org/abs/2405.21060, section 6.)

    Args:
        query, key: [B, S, d], for all heads.
        value: [B, S, H, p].
        log_keep: [B, S, H], logarithms of the shares kept, at most 0; float32 or wider.
        state: [B, d, H, p] before the first position, or None for zeros.
        starts: bool [B, S], where the state before is forgotten; None for nowhere.

    Returns:
        Answers [B, S, H, p], and the last state [B, d, H, p], in the dtype of `log_keep`; a kernel on the GPU leaves
        the answers in the value's.
    """
    parts = (query, key, value, log_keep)
    if has_kernels(query) and state is None and starts is None and query.shape[1] > 1 and fits(*parts):
        return summary_attention(*parts)
    wide, length = log_keep.dtype, query.shape[1]
    size = length if exporting() else min(SUMMARY_CHUNK, length)  # one chunk, whatever the length
    missing = 0 if exporting() else -length % size
    if missing:  # steps that change nothing
        query, key, log_keep = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, log_keep))
        value = F.pad(value, (0, 0, 0, 0, 0, missing))
        starts = None if starts is None else F.pad(starts, (0, missing))
    query, key, value = (x.unflatten(1, (-1, size)) for x in (query, key, value))  # [B, n, C, d or H, p]
    passed = log_keep.unflatten(1, (-1, size)).cumsum(dim=2)  # [B, n, C, H], from the chunk's start

    by_head = passed.transpose(2, 3)
    apart = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    share, until_end, kept = passed.exp(), (passed[:, :, -1:] - passed).exp(), passed[:, :, -1].exp()
    if starts is not None:
        begun = starts.unflatten(1, (-1, size)).cumsum(dim=2)  # [B, n, C]: 0 in what goes on from before the chunk
        apart = apart | (begun.unsqueeze(-1) != begun.unsqueeze(-2)).unsqueeze(2)
        share = share.masked_fill((begun > 0).unsqueeze(-1), 0)
        until_end = until_end.masked_fill((begun < begun[:, :, -1:]).unsqueeze(-1), 0)
        kept = kept.masked_fill(begun[:, :, -1:] > 0, 0)
    decay = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).masked_fill(apart, float("-inf")).exp()
    scores = (query @ key.transpose(2, 3)).unsqueeze(2) * decay  # [B, n, H, C, C]
    inside = (scores.to(value.dtype) @ value.transpose(2, 3)).transpose(2, 3)

    # Keys and queries are of all heads, so that one product serves them all: [d, C] · [C, H · p].
    added = (key.transpose(2, 3).to(wide) @ (value * until_end.unsqueeze(-1)).flatten(3)).unflatten(-1, value.shape[3:])
    kept = kept[:, :, None, :, None]  # of the state, by a whole chunk: [B, n, 1, H, 1]
    if state is not None:
        added = torch.cat([torch.addcmul(added[:, :1], kept[:, :1], state.unsqueeze(1)), added[:, 1:]], dim=1)
    states = linear_recurrence(kept.expand_as(added).flatten(2), added.flatten(2)).view_as(added)
    first = torch.zeros_like(states[:, :1]) if state is None else state.unsqueeze(1).to(wide)
    before = torch.cat([first, states[:, :-1]], dim=1)
    asked = (query.to(wide) @ before.flatten(3)).unflatten(-1, value.shape[3:])
    answer = inside + asked * share.unsqueeze(-1)
    return answer.flatten(1, 2)[:, :length], states[:, -1]

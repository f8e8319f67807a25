"""Triton kernel of the vocabulary loss.

A block of logits is read, and overwritten by its gradient: 2 bytes read and 2 written per logit in bfloat16 (a row is
read twice, the second time from the cache), where softmax, gather, subtraction and conversion move 20.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * vocab_size
    largest, total = float("-inf"), 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    normaliser = largest + tl.log(total)
    counts = target >= 0
    goal = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, normaliser - goal, 0.0))
    tl.debug_barrier()  # every warp has read the target's logit before one overwrites it
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        error = tl.exp(x - normaliser) - tl.where(column == target, 1.0, 0.0)
        error = tl.where(counts, error, 0.0)
        tl.store(logits + column, error.to(logits.dtype.element_ty), mask=column < vocab_size)


def cross_entropy_by_kernel_(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses float32 [T] of logits [T, V], which become their gradients; a negative target counts as nothing.

    targets: int64 [T].
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _cross_entropy_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], BLOCK=block, num_warps=8)
    return losses

"""Cross entropy over the vocabulary, block by block: the logits of all tokens never exist at once.

Plain torch stands here; on a GPU the kernel of `kernels_loss_globallocal.py` does the same where Triton is installed.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .library_globallocal import block_rows, has_kernels

with suppress(ImportError):  # without Triton `has_kernels` is false; by its name, so that the file travels with exports
    from .kernels_loss_globallocal import cross_entropy_by_kernel_

LOGIT_BLOCK_ELEMENTS = 2**23  # the largest block of vocabulary logits


def _cross_entropy(logits: Tensor, targets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [T], float32 or wider, of logits [T, V], and their gradients, in `memory`, which is as wide.

    targets: int64 [T]; what stands at negative ones does not count and is left to the caller to drop.
    """
    goal = targets.clamp_min(0).unsqueeze(1)
    error = torch.softmax(logits, dim=1, dtype=memory.dtype, out=memory)
    # log Σ exp by way of the largest entry: its probability cannot vanish.
    normaliser = logits.amax(dim=1, keepdim=True).to(error.dtype) - error.amax(dim=1, keepdim=True).log()
    losses = (normaliser - logits.gather(1, goal)).squeeze(1)
    error.scatter_add_(1, goal, torch.full_like(normaliser, -1.0))  # softmax − one-hot
    return losses, error if logits.dtype == error.dtype else logits.copy_(error)


class _VocabularyLoss(Function):
    """Sum of cross entropies; its gradient is computed block by block along with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        need = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need[2] else None
        total = hidden.new_zeros((), dtype=wide)
        block = block_rows(LOGIT_BLOCK_ELEMENTS, weight, hidden.shape[0])
        memory = hidden.new_empty(block, weight.shape[0])  # the same for all blocks
        wide_memory = None if has_kernels(hidden) else torch.empty_like(memory, dtype=wide)
        for start in range(0, hidden.shape[0], block):
            part, goal = hidden[start : start + block], targets[start : start + block]
            valid = (goal >= 0).to(hidden.dtype)
            logits = torch.addmm(bias, part, weight.T, out=memory[: len(part)])
            if wide_memory is None:
                losses, error = cross_entropy_by_kernel_(logits, goal), logits  # in place
            else:
                losses, error = _cross_entropy(logits, goal, wide_memory[: len(part)])
            total += (losses * valid).sum()
            if not any(need):
                continue
            # Where nothing counts, the input is as good as absent.
            if grad_bias is not None:
                grad_bias += error.sum(dim=0, dtype=wide) if wide_memory is None else torch.mv(error.T, valid)
            if grad_hidden is not None:
                torch.mm(error, weight, out=grad_hidden[start : start + block]).mul_(valid.unsqueeze(1))
            if grad_weight is not None:
                grad_weight += error.T @ (part * valid.unsqueeze(1))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if part is None else (part * grad).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def vocabulary_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T + bias` against `targets`, in blocks of tokens.

    The [T, V] logits never exist; the loss and its reductions are float32 (float64 for float64 inputs).

    Args:
        hidden: [T, h]. weight: [V, h]. bias: [V], or None for zeros.
        targets: int64 [T]; negative values (−100) do not count. Without any valid target the loss is 0.
    """
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    valid_tokens = (targets >= 0).sum().clamp_min(1)
    return _VocabularyLoss.apply(hidden, weight, bias, targets) / valid_tokens

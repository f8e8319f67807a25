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


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap); as they are where the cap is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def _cross_entropy(
    logits: Tensor, targets: Tensor, memory: Tensor, soft_cap: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies [T], float32 or wider, of logits [T, V], and with the z-loss on top; then the latter's gradients.

    These lie in `memory`, which is as wide; the logits become what is capped.

    targets: int64 [T]; what stands at negative ones does not count and is left to the caller to drop.
    """
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    goal = targets.clamp_min(0).unsqueeze(1)
    error = torch.softmax(logits, dim=1, dtype=memory.dtype, out=memory)
    # log Σ exp by way of the largest entry: its probability cannot vanish.
    normaliser = logits.amax(dim=1, keepdim=True).to(error.dtype) - error.amax(dim=1, keepdim=True).log()
    losses = (normaliser - logits.gather(1, goal)).squeeze(1)
    objective = losses + z_loss * normaliser.squeeze(1).square() if z_loss else losses
    if z_loss:
        error.mul_(1 + 2 * z_loss * normaliser)
    error.scatter_add_(1, goal, torch.full_like(normaliser, -1.0))  # softmax − one-hot
    if soft_cap:
        error.mul_(1 - (logits / soft_cap).square())
    return losses, objective, error if logits.dtype == error.dtype else logits.copy_(error)


class _VocabularyLoss(Function):
    """Sums of the objective and of cross entropies; the former's gradient is computed block by block along with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, soft_cap: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need[2] else None
        total, total_objective = hidden.new_zeros(2, dtype=wide).unbind()
        by_kernel = has_kernels(hidden) and not (soft_cap or z_loss)
        block = block_rows(LOGIT_BLOCK_ELEMENTS, weight, hidden.shape[0])
        memory = hidden.new_empty(block, weight.shape[0])  # the same for all blocks
        wide_memory = None if by_kernel else torch.empty_like(memory, dtype=wide)
        for start in range(0, hidden.shape[0], block):
            part, goal = hidden[start : start + block], targets[start : start + block]
            valid = (goal >= 0).to(hidden.dtype)
            logits = torch.addmm(bias, part, weight.T, out=memory[: len(part)])
            if wide_memory is None:
                losses = objective = cross_entropy_by_kernel_(logits, goal)
                error = logits  # in place
            else:
                memories = logits, goal, wide_memory[: len(part)]
                losses, objective, error = _cross_entropy(*memories, soft_cap, z_loss)
            total = total + (losses * valid).sum()
            total_objective = total_objective + (objective * valid).sum()
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
        ctx.mark_non_differentiable(total)
        return total_objective, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if part is None else (part * grad).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    soft_cap: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What is to be descended, and the mean cross entropy of `hidden @ weight.T + bias` against `targets`.

    In blocks of tokens: the [T, V] logits never exist. Losses and reductions are float32 (float64 for float64 inputs).

    Args:
        hidden: [T, h]. weight: [V, h]. bias: [V], or None for zeros.
        targets: int64 [T]; negative values (−100) do not count. Without any valid target the loss is 0.
        soft_cap: of the logits, `soft_capped`; 0 for none. Plain torch alone has it, and the z-loss.
        z_loss: factor of the mean of log² Σ exp(logits), which the objective has on top.

    Returns:
        Two scalars. With a z-loss only the first has a gradient; without, they are one.
    """
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    valid_tokens = (targets >= 0).sum().clamp_min(1)
    objective, total = _VocabularyLoss.apply(hidden, weight, bias, targets, soft_cap, z_loss)
    objective = objective / valid_tokens
    return objective, total / valid_tokens if z_loss else objective

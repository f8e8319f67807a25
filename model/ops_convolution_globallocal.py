"""Dilated causal convolutions as matrix products, with a backward pass that keeps the input alone.

Plain torch stands here; on a GPU the kernels of `kernels_convolution_globallocal.py` do the same where Triton is
installed.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .library_globallocal import has_kernels, opaque

with suppress(ImportError):  # without Triton `has_kernels` is false; by its name, so that the file travels with exports
    from .kernels_convolution_globallocal import convolve, input_gradient, suits_kernels, weight_gradient


def _taps(padded: Tensor, length: int, kernel_size: int, dilation: int) -> list[Tensor]:
    """Views of the K inputs of a causal convolution, each [B, S, h]; the last is the current position."""
    start = padded.shape[1] - length - (kernel_size - 1) * dilation
    return [padded[:, start + j * dilation :][:, :length] for j in range(kernel_size)]


def _in_document(tap: Tensor, offsets: Tensor | None, lag: int) -> Tensor:
    """[B, S, c]: 0 where the position `lag` before this one belongs to another document."""
    return tap if offsets is None or lag == 0 else tap.masked_fill((offsets < lag).unsqueeze(-1), 0)


def _side_by_side(padded: Tensor, offsets: Tensor | None, length: int, kernel_size: int, dilation: int) -> Tensor:
    """The K inputs of each position, those of other documents 0: [B, S, K·h]."""
    taps = enumerate(_taps(padded, length, kernel_size, dilation), start=1)
    return torch.cat([_in_document(tap, offsets, (kernel_size - j) * dilation) for j, tap in taps], dim=-1)


def _convolve(
    padded: Tensor, weight: Tensor, bias: Tensor, length: int, dilations: list[int], offsets: Tensor | None
) -> Tensor:
    """[B, P + S, h], S positions behind P ≥ (K − 1) · max dilation earlier ones → [B, S, n·h]."""
    kernel_size = weight.shape[2] // padded.shape[2]
    outputs = [
        F.linear(_side_by_side(padded, offsets, length, kernel_size, dilation), matrix, offset)
        for matrix, offset, dilation in zip(weight, bias, dilations, strict=True)
    ]
    return torch.cat(outputs, dim=-1)


def _pad(x: Tensor, weight: Tensor, dilations: list[int]) -> Tensor:
    """Zeros in front of a sequence, as far as its convolutions reach."""
    return F.pad(x, (0, 0, (weight.shape[2] // x.shape[2] - 1) * max(dilations), 0))


@opaque(lambda x, weight, *rest: x.new_empty(*x.shape[:2], weight.shape[0] * weight.shape[1]))
def convolution_forward(
    x: Tensor, weight: Tensor, bias: Tensor, dilations: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Output [B, S, n·h] of `causal_convolutions` without history."""
    steps = dilations.tolist()
    if offsets is None and has_kernels(x) and suits_kernels(x, weight, bias):
        return convolve(x, weight, bias, steps)
    return _convolve(_pad(x, weight, steps), weight, bias, x.shape[1], steps, offsets)


@opaque(lambda grad, x, weight, *rest: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilations: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, S, h] and weight [n, h, K·h] from that of the output [B, S, n·h]."""
    steps = dilations.tolist()
    length, kernel_size = x.shape[1], weight.shape[2] // x.shape[2]
    if offsets is None and has_kernels(x) and suits_kernels(x, weight, grad):
        return input_gradient(grad, weight, steps), weight_gradient(grad, x, kernel_size, steps)
    padded = _pad(x, weight, steps)
    grad_padded, grad_weight = torch.zeros_like(padded), weight.new_empty(weight.shape)
    for i, (part, dilation) in enumerate(zip(grad.chunk(len(weight), dim=-1), steps, strict=True)):
        rows = part.flatten(0, 1)
        taps = _side_by_side(padded, offsets, length, kernel_size, dilation)
        torch.mm(rows.T, taps.flatten(0, 1), out=grad_weight[i])
        grad_taps = (rows @ weight[i]).view_as(taps).chunk(kernel_size, dim=-1)
        targets = zip(_taps(grad_padded, length, kernel_size, dilation), grad_taps, strict=True)
        for j, (target, source) in enumerate(targets, start=1):
            target += _in_document(source, offsets, (kernel_size - j) * dilation)
    return grad_padded[:, -length:].clone(), grad_weight


class _CausalConvolutions(Function):
    """Keeps the input alone for the backward pass; the taps side by side, K times as large, are not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dilations: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, dilations, offsets)
        return convolution_forward(x, weight, bias, dilations, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dilations, offsets = ctx.saved_tensors
        grad_x, grad_weight = convolution_backward(grad.contiguous(), x, weight, dilations, offsets)
        return grad_x, grad_weight, grad.sum(dim=(0, 1)).view(len(weight), -1), None, None


def causal_convolutions(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilations: Tensor,
    history: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Parallel dilated causal convolutions, each a matrix product over shifted inputs.

    On a GPU without history and offsets, kernels that copy nothing; elsewhere products over the shifted inputs side by
    side.

    Args:
        x: [B, S, h].
        weight: [n, h, K·h], one matrix a dilation; tap K − 1 is the current position, tap j lies
            (K − 1 − j) · dilation before it.
        bias: [n, h].
        dilations: int64 [n], on the CPU: as data, so that layers which differ in them share what is compiled.
        history: [B, P, h], P ≥ (K − 1) · max dilation positions before x; None for zeros.
        offsets: int64 [B, S], how far back each position sees; None for any distance.

    Returns:
        [B, S, n·h], the outputs side by side.
    """
    if history is not None:
        return _convolve(torch.cat([history, x], dim=1), weight, bias, x.shape[1], dilations.tolist(), offsets)
    return _CausalConvolutions.apply(x, weight, bias, dilations, offsets)


class _ShortConvolution(Function):
    """Keeps the input alone, and writes the taps' gradients of the input into one memory."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, taps: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(padded, taps, offsets)
        parts = _taps(padded, padded.shape[1] - len(taps) + 1, len(taps), 1)
        first, *rest = (_in_document(part, offsets, len(taps) - j) for j, part in enumerate(parts, start=1))
        result = taps[0] * first
        for tap, part in zip(taps[1:], rest, strict=True):
            result.addcmul_(tap, part)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, taps, offsets = ctx.saved_tensors
        grad_padded, grad_taps = torch.zeros_like(padded), []
        parts, targets = (_taps(x, grad.shape[1], len(taps), 1) for x in (padded, grad_padded))
        for j, (part, target) in enumerate(zip(parts, targets, strict=True), start=1):
            of_tap = _in_document(grad, offsets, len(taps) - j)
            target.addcmul_(of_tap, taps[j - 1])
            grad_taps.append((of_tap * part).sum(dim=(0, 1)))
        return grad_padded, torch.stack(grad_taps), None


def short_convolution(padded: Tensor, taps: Tensor, offsets: Tensor | None = None) -> Tensor:
    """A causal convolution of each feature with itself: Σ_j taps[j] · padded[:, t + j].

    Args:
        padded: [B, K − 1 + S, c], the K − 1 positions before the first in front.
        taps: [K, c], the last one of the position itself.
        offsets: int64 [B, S], how far back each position sees; None for any distance.

    Returns:
        [B, S, c].
    """
    return _ShortConvolution.apply(padded, taps, offsets)

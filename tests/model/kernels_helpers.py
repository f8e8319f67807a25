"""Where kernels are tested, inputs of theirs, and what is compared."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def gates(kind: str, *shape: int) -> Tensor:
    """Logarithms of the shares kept, float32."""
    wide = {"usual": 2.0, "open": 1e-4, "closed": 30.0, "mixed": 1e-4}[kind]
    log_keep = -wide * torch.rand(shape)
    return torch.where(torch.rand(shape) < 0.2, -30.0, log_keep) if kind == "mixed" else log_keep


def results(function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Answers, last state and the gradients of all inputs, through both results."""
    answers, last = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in (answers, last)]
    return [answers, last, *torch.autograd.grad((answers, last), tensors, grads)]

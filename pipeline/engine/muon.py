"""Muon for hidden matrices and AdamW for all else, in one optimizer whose tensors ZeRO may cut up as it likes.

Muon (https://kellerjordan.github.io/posts/muon/) moves a matrix by the nearest orthogonal one to its averaged gradient.
That takes whole matrices, while ZeRO hands each rank a part of one long tensor. So ranks put each matrix together,
share out the work, and each takes its own part of the result. It happens where AdamW's step would: behind the
norm that the guard looks at and behind clipping, at every stage alike.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MATRICES = "matrices"
"""Name of the parameter group that Muon moves."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW_RMS = 0.2
"""Root mean square of AdamW's usual update (arXiv:2502.16982): Muon's is made as long, so that one learning rate, one
schedule and one weight decay serve both."""
BATCH_ELEMENTS = 2**26
"""Of the parameters that are put together at once; a larger one is alone."""


class Part(NamedTuple):
    """What a rank holds of a parameter: `elements` of it from `start` on, in a flat tensor from `flat_start` on.

    `shape` is the parameter's: a matrix [m, n], or a stack of them [b, m, n].
    """

    shape: tuple[int, ...]
    start: int
    flat_start: int
    elements: int


class Muon(torch.optim.AdamW):
    """AdamW, but for the group named `MATRICES`, which has a `momentum`.

    Its state is AdamW's `exp_avg`, the averaged gradient, without `exp_avg_sq`.
    """

    def __init__(self, groups: Any, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._parts: dict[Tensor, list[Part]] = {}
        self._cut_up = False
        self._dtype = torch.float32

    def attach(self, parts: Mapping[Tensor, list[Part]], cut_up: bool, dtype: torch.dtype) -> None:
        """Say what lies in this rank's tensors.

        Args:
            parts: flat tensor → what this rank holds of each parameter there, in the same order on every rank.
            cut_up: ranks hold parts of a matrix, not each the whole of it.
            dtype: in which matrices travel and are orthogonalized.
        """
        self._parts, self._cut_up, self._dtype = dict(parts), cut_up, dtype

    def has_one_moment(self, flat: Tensor) -> bool:
        return flat in self._parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """All ranks call it, and each with the same tensors; one without a gradient stays as it is.

        Gradients of matrices become their updates, in place.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["name"] != MATRICES]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["name"] == MATRICES:
                self._move(group)
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        updates = {tensor: tensor.grad for tensor in group["params"] if tensor.grad is not None}
        for tensor, update in updates.items():
            self._average(tensor, update, group["momentum"])
        self._orthogonalize(updates)
        for tensor, update in updates.items():
            tensor.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _average(self, tensor: Tensor, gradient: Tensor, momentum: float) -> None:
        """The gradient becomes the averaged one, half a step ahead (Nesterov)."""
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - momentum)
        gradient.lerp_(state["exp_avg"], momentum)

    def _orthogonalize(self, updates: Mapping[Tensor, Tensor]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Part]]] = defaultdict(list)
        for tensor, update in updates.items():
            whole = [Part(tuple(tensor.shape), 0, 0, tensor.numel())]
            for part in self._parts.get(tensor, whole):
                by_shape[part.shape].append((update.view(-1), part))
        for shape, places in by_shape.items():
            for batch in _batches(places, parameters_at_once(shape)):
                self._orthogonalize_batch(shape, batch)

    def _orthogonalize_batch(self, shape: tuple[int, ...], batch: Sequence[tuple[Tensor, Part]]) -> None:
        """Parameters of one shape, in place. Adding zeros is exact: the result hangs on no order of ranks."""
        size = math.prod(shape)
        rows = torch.zeros(len(batch), size, dtype=self._dtype, device=batch[0][0].device)
        for row, (flat, part) in zip(rows, batch, strict=True):
            row[part.start : part.start + part.elements] = flat[part.flat_start : part.flat_start + part.elements]
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if self._cut_up and ranks > 1:
            dist.all_reduce(rows)
        matrices = rows.view(-1, *shape[-2:])
        own = orthogonal(matrices[rank::ranks]) * (ADAMW_RMS * math.sqrt(max(shape[-2:])))
        if ranks > 1:
            rows.zero_()
        matrices[rank::ranks] = own
        if ranks > 1:
            dist.all_reduce(rows)
        for row, (flat, part) in zip(rows, batch, strict=True):
            flat[part.flat_start : part.flat_start + part.elements] = row[part.start : part.start + part.elements]


def parameters_at_once(shape: Sequence[int]) -> int:
    return max(1, BATCH_ELEMENTS // math.prod(shape))


def _batches(places: Sequence[tuple[Tensor, Part]], most: int) -> Iterator[Sequence[tuple[Tensor, Part]]]:
    for first in range(0, len(places), most):
        yield places[first : first + most]


def orthogonal(matrices: Tensor) -> Tensor:
    """[k, m, n] → about the nearest orthogonal matrix of each: singular values between 0.5 and 1.5.

    Five steps of a Newton-Schulz iteration, with Keller Jordan's coefficients.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

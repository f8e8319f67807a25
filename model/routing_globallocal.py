"""Watching what tokens read, from outside: the blocks do nothing for it, and nothing is kept where nobody looks.

Shapes and symbols as in `configuration_globallocal.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .outputs_globallocal import Routing
from .router_globallocal import TensorRouter, at_least_float32


class RoutingWatch:
    """Keeps what gates and routers gave in one forward pass, in the order of the blocks."""

    def __init__(self) -> None:
        self._gates: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._shares: list[Tensor] = []

    def keep_gate(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A hook of a gate: output [B, S, 1], before the sigmoid."""
        self._gates.append(at_least_float32(output.detach())[..., 0].sigmoid())

    def keep_choice(self, router: TensorRouter, output: Any) -> None:
        """The rows that a router chose, and its scores, [T, k] each."""
        choice, scores = output
        shares, order = router._weights(scores.detach()).sort(dim=-1, descending=True)
        self._rows.append(choice.indices.gather(1, order))
        self._shares.append(shares)

    def routing(self) -> Routing:
        """Everything that was seen."""
        gates = torch.stack(self._gates, dim=-1)

        def stacked(parts: list[Tensor]) -> Tensor:
            by_token = torch.stack(parts, dim=1).unflatten(1, (len(self._gates), -1))
            return by_token.unflatten(0, gates.shape[:2])

        return Routing(gates, stacked(self._rows), stacked(self._shares))


@contextmanager
def watched_routing(model: nn.Module) -> Iterator[RoutingWatch]:
    """Inside, a forward pass of the model is watched."""
    watch, hooks = RoutingWatch(), []
    try:
        for module in model.modules():
            if isinstance(module, TensorRouter):
                hooks.append(module.scores.register_forward_hook(_choice_hook(watch, module)))
            gate = getattr(module, "gate", None)
            if isinstance(gate, nn.Module):
                hooks.append(gate.register_forward_hook(watch.keep_gate))
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _choice_hook(watch: RoutingWatch, router: TensorRouter) -> Any:
    return lambda module, inputs, output: watch.keep_choice(router, output)

"""The loss by position in the sequence, and by what stood before the target.

A model that has little memory for what it read shows it here: its loss stops falling with the position, and what came
before costs it as much as what is new.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pipeline.evaluation.held_out import Batch

HISTORIES = ("bigram repeated", "token repeated", "token new")
"""What stood before a target in its window: the same two tokens; the token, but behind another; nothing like it."""
LOGITS_BYTES = 1 << 28
"""Of the logits held at once."""


@dataclass(frozen=True)
class Group:
    """Targets with something in common.

    Attributes:
        name: what; of positions "8-15", counted from 0, the first target of a window.
        loss: in nats per token; NaN where there are no targets.
        targets: how many.
    """

    name: str
    loss: float
    targets: int


@dataclass(frozen=True)
class ByPosition:
    """Sums over the targets of a split.

    Attributes:
        nats: float64 [S], by position.
        targets: int64 [S], likewise.
        history_nats, history_targets: float64 and int64 [3], as `HISTORIES` has them.
    """

    nats: np.ndarray
    targets: np.ndarray
    history_nats: np.ndarray
    history_targets: np.ndarray

    def positions(self) -> list[Group]:
        """Position 0, then 1, 2-3, 4-7 and so on."""
        edges = [0, *(1 << power for power in range((len(self.nats) - 1).bit_length())), len(self.nats)]
        return [
            _group(
                f"{first}" if last == first + 1 else f"{first}-{last - 1}",
                self.nats[first:last].sum(),
                self.targets[first:last].sum(),
            )
            for first, last in pairwise(edges)
        ]

    def histories(self) -> list[Group]:
        return [_group(*item) for item in zip(HISTORIES, self.history_nats, self.history_targets, strict=True)]


def _group(name: str, nats: Any, targets: Any) -> Group:
    return Group(name, float(nats / targets) if targets else math.nan, int(targets))


def histories(tokens: np.ndarray) -> np.ndarray:
    """int64 [B, S]: the number in `HISTORIES` of each target tokens[:, 1:], by the tokens of its row before it.

    Args:
        tokens: int64 [B, S + 1].
    """
    known = np.stack([_came_before(row)[1:] for row in tokens])
    pairs = tokens[:, :-1] * (int(tokens.max(initial=0)) + 1) + tokens[:, 1:]
    pair_known = np.stack([_came_before(row) for row in pairs])
    return np.where(pair_known, 0, np.where(known, 1, 2))


def _came_before(values: np.ndarray) -> np.ndarray:
    """bool [n]: which of int64 [n] stand further left too."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    found: np.ndarray = first[group] < np.arange(len(values))
    return found


@torch.no_grad()
def loss_by_position(model: Any, batches: Iterable[Batch], device: torch.device) -> ByPosition:
    """Measure a plain model in one process.

    Args:
        batches: int64 tokens [B, S+1] and a boolean mask [B, S] of the targets that count; one S for all.
    """
    model.eval()
    sums: ByPosition | None = None
    for tokens, counted in batches:
        nats = np.where(counted, target_losses(model, tokens, device), 0.0)
        if sums is None:
            length, kinds = tokens.shape[1] - 1, len(HISTORIES)
            sums = ByPosition(np.zeros(length), np.zeros(length, np.int64), np.zeros(kinds), np.zeros(kinds, np.int64))
        sums.nats[:] += nats.sum(axis=0)
        sums.targets[:] += counted.sum(axis=0)
        kind = histories(tokens)
        for number in range(len(HISTORIES)):
            chosen = (kind == number) & counted
            sums.history_nats[number] += nats[chosen].sum()
            sums.history_targets[number] += chosen.sum()
    assert sums is not None, "a split has at least one target"
    return sums


def target_losses(model: Any, tokens: np.ndarray, device: torch.device) -> np.ndarray:
    """float64 [B, S]: the loss of each target in nats, of int64 tokens [B, S+1]."""
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size * max(1, tokens.shape[1] - 1)))
    parts = []
    for some in torch.from_numpy(tokens).split(rows):
        ids = some.to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        parts.append(losses.view(len(ids), -1).double().cpu())
    return torch.cat(parts).numpy()

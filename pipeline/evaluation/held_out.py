"""The loss of a held-out split, over all ranks where there are several."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.corpus import Corpus, Part
from pipeline.data.loader import evaluation_batches
from pipeline.data.token_stream import TokenStream
from pipeline.evaluation.figures import HeldOut, mixed, perplexities

IGNORED = -100
"""Target that adds no loss, by the convention of PyTorch and transformers."""

Batch = tuple[np.ndarray, np.ndarray]


def nothing() -> None:
    """What is called before each batch where nobody wants to know."""


@dataclass(frozen=True)
class HeldOutText:
    """What is measured, and in what pieces.

    Attributes:
        batch_size: samples per rank at once.
        max_samples: of each dataset, only the first so many; None is all.
        stride: tokens from one sample to the next; fewer than `sequence_length` give each target more text before
            it, as `evaluation_batches` says; None is blocks side by side.
    """

    corpus: Corpus
    split: str
    sequence_length: int
    batch_size: int
    max_samples: int | None
    stride: int | None = None

    def batches(self, part: Part) -> Iterator[Batch]:
        """This rank's batches of one dataset, as `evaluation_batches` gives them."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with closing(TokenStream(part.dataset, self.split)) as stream:
            yield from evaluation_batches(
                stream, self.sequence_length, self.batch_size, rank, ranks, self.max_samples, self.stride
            )


def held_out(
    model: Any, text: HeldOutText, device: torch.device, before_batch: Callable[[], None] = nothing
) -> HeldOut:
    """Measure `model`, a DeepSpeed engine or a plain model, on `text`.

    Args:
        before_batch: called before each batch; what it raises ends the measurement.
    """
    results, splits = {}, []
    for part in text.corpus.parts:
        nats, targets = summed_loss(model, text.batches(part), device, before_batch)
        splits.append(part.dataset.manifest.splits[text.split])
        results[part.name] = perplexities(nats, targets, splits[-1])
    if len(results) == 1:
        return HeldOut(next(iter(results.values())))
    return mixed(results, [float(part.share) for part in text.corpus.parts], splits)


@torch.no_grad()
def summed_loss(
    model: Any, batches: Iterable[Batch], device: torch.device, before_batch: Callable[[], None] = nothing
) -> tuple[float, int]:
    """Sum of the language loss in nats, and the number of targets, over all ranks.

    Args:
        model: a DeepSpeed engine or a plain model.
        batches: int64 tokens [B, S+1] and a boolean mask [B, S] of the targets that count; the same number on
            every rank, since under ZeRO-3 each forward is a collective.
        before_batch: called before each; what it raises ends the measurement.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, counted in batches:
        before_batch()
        ids = torch.from_numpy(tokens).to(device)
        targets = ids[:, 1:].masked_fill(~torch.from_numpy(counted).to(device), IGNORED)
        valid = (targets != IGNORED).sum()
        loss = model(input_ids=ids[:, :-1], shift_labels=targets).language_loss.double()
        sums += torch.stack([torch.where(valid > 0, loss * valid, 0.0), valid.double()])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0].item(), round(sums[1].item())

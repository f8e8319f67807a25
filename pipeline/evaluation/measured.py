"""What `globallocal evaluate` measures: each dataset's figures, with all that they are divided by."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.corpus import Part
from pipeline.data.loader import evaluation_windows
from pipeline.evaluation.by_position import ByPosition, loss_by_position
from pipeline.evaluation.figures import Figures, mixed, perplexities
from pipeline.evaluation.held_out import Batch, HeldOutText, summed_loss


@dataclass(frozen=True)
class Measured:
    """One dataset.

    Attributes:
        words: words and line ends of what was measured, the denominator of the perplexity per word.
        source_bytes: likewise, of the bits per byte.
        estimated: only a part of the split was measured, and `words` and `source_bytes` are the split's own per token.
    """

    part: Part
    figures: Figures
    words: int
    source_bytes: int
    estimated: bool
    by_position: ByPosition | None = None


def num_targets(text: HeldOutText, part: Part) -> int:
    """How many target tokens of a dataset are measured."""
    tokens, stride = part.dataset.split(text.split).tokens, text.stride or text.sequence_length
    windows = min(evaluation_windows(tokens, text.sequence_length, stride), text.max_samples or tokens)
    return max(0, min(tokens - 1, text.sequence_length + (windows - 1) * stride))


def measure(
    model: Any, text: HeldOutText, device: torch.device, by_position: bool, done: Callable[[str, int], None]
) -> list[Measured]:
    """Measure a plain model on every dataset of `text`, in one process.

    Args:
        by_position: also where in the window, and on which targets, the loss lies.
        done: called behind each batch with the dataset's name and the number of targets in it.
    """
    found = []
    for part in text.corpus.parts:
        batches = _told(text.batches(part), part.name, done)
        places = None
        if by_position:
            places = loss_by_position(model, batches, device)
            nats, targets = float(places.nats.sum()), int(places.targets.sum())
        else:
            nats, targets = summed_loss(model, batches, device)
        info = part.dataset.manifest.splits[text.split]
        words = round(targets * (info.words + info.lines) / info.tokens)
        source_bytes = round(targets * info.source_bytes / info.tokens)
        estimated = targets < info.tokens - 1
        figures = perplexities(nats, targets, info)
        found.append(Measured(part, figures, words, source_bytes, estimated, places))
    return found


def _told(batches: Iterable[Batch], name: str, done: Callable[[str, int], None]) -> Iterator[Batch]:
    for tokens, counted in batches:
        yield tokens, counted
        done(name, int(counted.sum()))


def as_mixed(found: Sequence[Measured], split: str) -> Figures:
    """The figures of the datasets mixed as in training."""
    by_name = {item.part.name: item.figures for item in found}
    splits = [item.part.dataset.manifest.splits[split] for item in found]
    return mixed(by_name, [float(item.part.share) for item in found], splits).total

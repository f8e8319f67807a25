"""Several datasets read as one: which dataset comes at which position is a pure function of the weights.

Each dataset goes through epochs of its own, every sample once in each, and at any moment its share of the
samples read so far is within one sample of what its weight asks. The state is still one count.

The weights w_d = a_d / A are whole numbers of samples in a period of A positions. One period is scheduled as
unit jobs with release times and deadlines, earliest deadline first: the k-th sample of dataset d may come
from position floor((k - 1) / w_d) on and must come before ceil(k / w_d). That order meets every deadline,
because the weights sum to one (Baruah, Cohen, Plaxton and Varvel 1996, doi:10.1007/BF01940883), and so the
count of d after p positions is floor(p·w_d) or ceil(p·w_d).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from data_prep.errors import UserError
from pipeline.data.samples import SampleSource, check_cache

MAX_PERIOD = 100_000

Weight = int | float | str | Fraction


@dataclass(frozen=True)
class MixtureOrder:
    """One period of A positions.

    Attributes:
        dataset: int16 [A], the dataset read at each position of the period.
        occurrence: int64 [A], how many samples of that dataset come before it in the period.
        counts: int64 [D], samples of each dataset in a period: its weight times A.
    """

    dataset: np.ndarray
    occurrence: np.ndarray
    counts: np.ndarray

    def locate(self, position: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset and its own position, int16 and int64 [n], at positions of the mixture."""
        period, slot = np.divmod(np.atleast_1d(np.asarray(position, dtype=np.int64)), len(self.dataset))
        dataset = self.dataset[slot]
        return dataset, period * self.counts[dataset] + self.occurrence[slot]

    def consumed(self, position: int) -> np.ndarray:
        """int64 [D]: samples of each dataset among the first `position` ones."""
        period, slot = divmod(position, len(self.dataset))
        return period * self.counts + np.bincount(self.dataset[:slot], minlength=len(self.counts))


def mixture_order(weights: Sequence[Weight]) -> MixtureOrder:
    """The schedule for weights of any scale: 3 and 1, "0.75" and "0.25", or fractions.

    Raises UserError for a weight that is not a positive number, and for weights whose period would be longer
    than 100,000 positions.
    """
    exact = [_exact(weight) for weight in weights]
    if problems := [
        f"mixture weight {weights[i]!r} (number {i + 1}) must be a finite number above 0"
        for i, weight in enumerate(exact)
        if weight is None or weight <= 0
    ]:
        raise UserError(problems)
    shares = [weight for weight in exact if weight is not None]
    scale = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * scale) for share in shares]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > MAX_PERIOD:
        total = sum(shares)
        rounded = ", ".join(f"{float(share / total):.4f}" for share in shares)
        raise UserError(
            f"mixture weights {', '.join(map(str, weights))} repeat only after {sum(counts):,} samples, "
            f"at most {MAX_PERIOD:,} are allowed; round them, for example to {rounded}"
        )
    dataset = _schedule(counts)
    occurrence = np.empty(len(dataset), np.int64)
    for number, count in enumerate(counts):
        occurrence[dataset == number] = np.arange(count)
    return MixtureOrder(dataset, occurrence, np.array(counts, np.int64))


def _exact(weight: Weight) -> Fraction | None:
    """Decimal numbers mean what is written: 0.1 is one tenth. None for what is no number."""
    try:
        return Fraction(str(weight))
    except (ValueError, ZeroDivisionError):
        return None


def _schedule(counts: Sequence[int]) -> np.ndarray:
    """int16 [A]: at each position, of the samples released so far, the one with the earliest deadline."""
    period = sum(counts)
    order = np.empty(period, np.int16)
    waiting = [(0, dataset, 1) for dataset in range(len(counts))]  # (release, dataset, k)
    ready: list[tuple[int, int, int]] = []  # (deadline, dataset, k)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, dataset, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-k * period // counts[dataset]), dataset, k))
        _, dataset, k = heapq.heappop(ready)
        order[slot] = dataset
        if k < counts[dataset]:
            heapq.heappush(waiting, (k * period // counts[dataset], dataset, k + 1))
    return order


class MixtureSource:
    """Several sources of samples as one; its samples are numbered through, one source after the other.

    Args:
        sources: of the same sequence length.
        weights: one for each.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[Weight]) -> None:
        if not sources or len(sources) != len(weights):
            raise UserError(f"a mixture needs one weight per dataset: {len(sources)} and {len(weights)} given")
        if len({source.sequence_length for source in sources}) > 1:
            raise ValueError("the sources of a mixture must have one sequence length")
        check_cache(sources)
        self.sources = list(sources)
        self.order = mixture_order(weights)
        self.sequence_length = sources[0].sequence_length
        self._starts = np.cumsum([0, *(source.num_samples for source in sources)])
        self.num_samples = int(self._starts[-1])

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the sample at each position, numbered through all sources."""
        dataset, own_position = self.order.locate(positions)
        indices = np.empty(len(dataset), np.int64)
        for number, source in enumerate(self.sources):
            chosen = dataset == number
            indices[chosen] = self._starts[number] + source.sample_indices(own_position[chosen])
        return indices

    def read(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n, S + 1]: the tokens of each sample."""
        number = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), self.sequence_length + 1), np.int64)
        for each in np.unique(number):
            chosen = number == each
            rows[chosen] = self.sources[each].read(indices[chosen] - self._starts[each])
        return rows

    def locate(self, sample: int) -> dict[str, Any]:
        """As `SampleSource.locate`, with the dataset; `sample` stays the number in the mixture."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        place = self.sources[number].locate(sample - int(self._starts[number]))
        return {"dataset": str(self.sources[number].dataset.folder), **place, "sample": sample}

    def ahead(self, position: int) -> None:
        """Tells each remote source where reading is."""
        if not any(source.remote for source in self.sources):
            return
        for source, own_position in zip(self.sources, self.order.consumed(position).tolist(), strict=True):
            source.ahead(own_position)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n, S + 1]: the tokens of the sample at each position."""
        return self.read(self.sample_indices(positions))

    def close(self) -> None:
        for source in self.sources:
            source.close()

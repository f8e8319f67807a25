"""From a dataset to batches: the only state is a count of consumed samples.

Legend: T tokens of the split; S sequence_length; N = (T - 1) // S samples per epoch; G global_batch_size;
M micro_batch_size; W world_size. Sample i is stream[i·S : i·S + S + 1]: inputs and, shifted by one, targets.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np

from data_prep.errors import UserError
from pipeline.data.samples import Source
from pipeline.data.token_stream import TokenStream
from pipeline.settings.batches import Ranges, Whole, consumed, data_step
from pipeline.settings.section import counted
from pipeline.settings.sections import TrainingSection

_PLANNED_SAMPLES = 4096  # indices computed at once: numpy's cost per call disappears in so many
_HANDED_OVER = 4  # batches at once: waking the other thread for each costs as much as reading one
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class BatchLayout:
    """How the G samples of a step are shared out: G = M × W × gradient_accumulation_steps.

    Position p = first_sample(step) + micro_step·(M·W) + rank·M + sample, so every W that divides reads the same global
    batches. Raises UserError, with the world sizes and micro-batches that fit, if one does not.

    Attributes:
        warmup: (batches, samples of each) of the smaller global batches in front; `global_batch_size` is that of all
            behind them.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    warmup: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, training: TrainingSection, ranks: int) -> BatchLayout:
        return cls(training.global_batch_size, training.micro_batch_size, ranks, training.warmup)

    def __post_init__(self) -> None:
        sizes = {name: vars(self)[name] for name in ("global_batch_size", "micro_batch_size", "world_size")}
        if problems := [f"{name} ({size}) must be at least 1" for name, size in sizes.items() if size < 1]:
            raise UserError(problems)
        together = self.micro_batch_size * self.world_size
        every = dict.fromkeys((*(size for _, size in self.warmup), self.global_batch_size))
        if problems := [self._does_not_divide(size) for size in every if size % together]:
            raise UserError(problems)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Behind the warm-up."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def size(self, batch: Whole) -> Whole:
        """Samples of global batch `batch`."""
        samples: Whole = self.first_sample(batch + 1) - self.first_sample(batch)
        return samples

    def first_sample(self, batch: Whole) -> Whole:
        """Samples of all global batches in front of `batch`."""
        return consumed(batch, self.global_batch_size, self.warmup)

    def __str__(self) -> str:
        ranks, steps = counted(self.world_size, "rank"), counted(self.gradient_accumulation_steps, "accumulation step")
        return f"{self.global_batch_size} samples = {self.micro_batch_size} micro-batch × {ranks} × {steps}"

    def position(self, step: Whole, micro_step: Whole, rank: int, sample: int) -> Whole:
        """Position in the order of all samples of one sample of a rank's micro-batch; `step` counts global batches."""
        micro_step_samples = self.micro_batch_size * self.world_size
        first: Whole = self.first_sample(step) + micro_step * micro_step_samples
        return first + rank * self.micro_batch_size + sample

    def first_step(self, consumed_samples: int) -> int:
        """The step after `consumed_samples`. Raises UserError if that is not a whole number of steps."""
        step, left = 0, consumed_samples
        for batches, size in (*self.warmup, (math.inf, self.global_batch_size)):
            if left <= batches * size:
                break
            step, left = step + int(batches), left - int(batches) * size
        more, rest = divmod(left, size)
        if rest or consumed_samples < 0:
            fitting = ", ".join(map(str, _divisors(abs(consumed_samples))[-12:]))
            raise UserError(
                f"consumed_samples ({consumed_samples}) must be a multiple of global_batch_size "
                f"({size}): samples would be skipped or repeated; "
                f"go on with a global_batch_size that divides it: {fitting}"
            )
        return step + more

    def _does_not_divide(self, total: int) -> str:
        micro, world = self.micro_batch_size, self.world_size
        worlds = ", ".join(map(str, _divisors(total // micro))) if total % micro == 0 else "none"
        micros = ", ".join(map(str, _divisors(total // world))) if total % world == 0 else "none"
        below = total // (micro * world) * micro * world
        nearest = [str(size) for size in (below, below + micro * world) if size]
        return (
            f"global_batch_size ({total}) must be divisible by micro_batch_size ({micro}) × "
            f"world_size ({world}); valid world sizes for this micro-batch: {worlds}; "
            f"valid micro-batches for this world size: {micros}; nearest global batches: {', '.join(nearest)}"
        )


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


class BatchLoader:
    """The micro-batches of one rank, from any whole step on, without end: iterates int64 [M, S + 1].

    One thread reads a few batches ahead, two lots of `_HANDED_OVER`. What it raises is raised by `next`.
    `close`, leaving a `with`, or letting go of the loader ends the thread.

    Args:
        source: samples in order.
        layout: how a step is shared out.
        rank: of this process.
        consumed_samples: the position in the data to go on from; a multiple of G, else UserError.
        skipped: global batches that are left out.
    """

    def __init__(
        self, source: Source, layout: BatchLayout, rank: int, consumed_samples: int, skipped: Ranges = ()
    ) -> None:
        if not 0 <= rank < layout.world_size:
            raise ValueError(f"rank ({rank}) must be in [0, world_size = {layout.world_size})")
        batches = micro_batches(source, layout, rank, layout.first_step(consumed_samples), skipped)
        self._requests: SimpleQueue[int] = SimpleQueue()
        self._results: SimpleQueue[list[np.ndarray | BaseException]] = SimpleQueue()
        self._ready: deque[np.ndarray | BaseException] = deque()
        self._closed = False
        # The thread must not hold the loader, or a loader that is let go of would never end it.
        self._thread = Thread(
            target=_answer, args=(batches, self._requests, self._results), name="batch-loader", daemon=True
        )
        self._stop = weakref.finalize(self, self._requests.put, 0)
        self._thread.start()
        self._requests.put(1)  # the first batch does not wait for others
        self._requests.put(_HANDED_OVER)

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> np.ndarray:
        if self._closed:
            raise RuntimeError("the batch loader is closed")
        if not self._ready:
            self._ready.extend(self._results.get())
            self._requests.put(_HANDED_OVER)
        batch = self._ready.popleft()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """Ends the thread after the read it is in; waits for it, but not long for a slow network."""
        self._closed = True
        while not self._requests.empty():  # forget what was asked for, so that the stop comes next
            with contextlib.suppress(Empty):
                self._requests.get_nowait()
        self._stop()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(
    batches: Iterator[np.ndarray],
    requests: SimpleQueue[int],
    results: SimpleQueue[list[np.ndarray | BaseException]],
) -> None:
    """The reading thread: as many batches as each request says, the end at 0 or the first exception."""
    ready: list[np.ndarray | BaseException] = []
    try:
        while count := requests.get():
            for _ in range(count):
                ready.append(next(batches))
            results.put(ready)
            ready = []
    except BaseException as error:
        results.put([*ready, error])


def micro_batches(source: Source, layout: BatchLayout, rank: int, first: int, skipped: Ranges) -> Iterator[np.ndarray]:
    """Every micro-batch of a rank from global batch `first` on; indices are computed for many of them at once."""
    size, together = layout.micro_batch_size, layout.micro_batch_size * layout.world_size
    planned = max(1, _PLANNED_SAMPLES // size // layout.gradient_accumulation_steps)  # steps
    ahead = tuple((max(first, begin), end) for begin, end in skipped if end > first)
    done = first
    while True:
        batches = data_step(np.arange(done, done + planned, dtype=np.int64), ahead)
        micro_steps = layout.size(batches) // together
        micro_step = np.arange(micro_steps.sum()) - np.repeat(micro_steps.cumsum() - micro_steps, micro_steps)
        starts = layout.position(np.repeat(batches, micro_steps), micro_step, rank, 0)
        indices = source.sample_indices((starts[:, None] + np.arange(size)).ravel()).reshape(-1, size)
        for start, batch in zip(starts.tolist(), indices, strict=True):
            source.ahead(start)
            yield source.read(batch)
        done += planned


def batch_hash(source: Source, layout: BatchLayout, batch: int) -> str:
    """Hex sha256 of the tokens (little-endian int64) of global batch `batch` (see `data_step`), in order of position.

    The same for every micro-batch and world size: it names what the next step trains on.
    """
    digest = hashlib.sha256()
    first, last = layout.first_sample(batch), layout.first_sample(batch + 1)
    for start in range(first, last, 256):
        indices = source.sample_indices(np.arange(start, min(start + 256, last)))
        digest.update(source.read(indices).astype("<i8").tobytes())
    return digest.hexdigest()


def evaluation_windows(tokens: int, sequence_length: int, stride: int) -> int:
    """How many windows of S tokens, each `stride` behind the one before, hold every target of T tokens."""
    targets = max(0, tokens - 1)
    return min(targets, 1) + max(0, -(-(targets - sequence_length) // stride))


def evaluation_batches(
    stream: TokenStream,
    sequence_length: int,
    batch_size: int,
    rank: int,
    world_size: int,
    max_samples: int | None = None,
    stride: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The split in its own order, every target once over all ranks, the same number of batches on each rank.

    A stream of T tokens has T - 1 targets; the last sample is shorter than S where S does not divide that,
    and the batches at the end may hold rows of padding. Nothing is dropped, and no rank runs dry first.

    Args:
        max_samples: only the first so many samples.
        stride: tokens from the start of one sample to that of the next, 1 to S; S, blocks side by side, when absent.
            Where samples overlap, a target counts in the first that holds it: there it has S - stride tokens or
            more before it.

    Yields:
        tokens int64 [B, S + 1], zero where padded, and valid bool [B, S]: which targets tokens[:, 1:] count.
    """
    stride = stride or sequence_length
    targets = max(0, stream.tokens - 1)
    num_samples = evaluation_windows(stream.tokens, sequence_length, stride)
    if max_samples is not None:
        num_samples = min(num_samples, max_samples)
    together = batch_size * world_size
    for start_of_all in range(0, num_samples, together):
        first = start_of_all + rank * batch_size
        tokens = np.zeros((batch_size, sequence_length + 1), np.int64)
        valid = np.zeros((batch_size, sequence_length), bool)
        for row, sample in enumerate(range(first, min(first + batch_size, num_samples))):
            start = sample * stride
            count = min(sequence_length, targets - start)
            tokens[row, : count + 1] = stream.read(start, count + 1)
            valid[row, sequence_length - stride if sample else 0 : count] = True
        yield tokens, valid

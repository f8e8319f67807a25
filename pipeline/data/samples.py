"""A split of a dataset as samples of one length, in order.

Legend: T tokens of the split; S sequence_length; N = (T - 1) // S samples per epoch.
Sample i is stream[i·S : i·S + S + 1]: inputs and, shifted by one, targets.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Dataset
from pipeline.data.order import SampleOrder, WindowedOrder
from pipeline.data.remote import RemoteDataset, ShardPrefetcher
from pipeline.data.token_stream import TokenStream

_BLOCK_SHARDS = 4  # read together in a windowed order: each block also needs a token of the shard behind it


class Source(Protocol):
    """Samples in an endless, fixed order."""

    num_samples: int
    sequence_length: int

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the sample, in [0, num_samples), at each position."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n, S + 1]: the tokens of each sample."""

    def locate(self, sample: int) -> dict[str, Any]:
        """Where a sample lies, for a person; see `SampleSource.locate`."""

    def ahead(self, position: int) -> None:
        """Hears which position is read next, so that what follows can be fetched; returns at once."""


class SampleSource:
    """One split of a dataset, cut into samples and put in order.

    Args:
        dataset: an opened dataset.
        split: its name.
        sequence_length: S.
        seed: of the order.
        window_tokens: None permutes all samples of an epoch. A number permutes them in windows of about so
            many tokens, for a remote dataset larger than its cache; 2^30 tokens mix well and ask for a cache
            of about 6 GiB. It is part of the order: another number is another order.

    Raises UserError if the split is unknown or holds no whole sample, and for a remote dataset if the cache
    cannot hold two windows.
    """

    def __init__(
        self, dataset: Dataset, split: str, sequence_length: int, seed: int, window_tokens: int | None = None
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length ({sequence_length}) must be at least 1")
        self.dataset = dataset
        self.remote = dataset if isinstance(dataset, RemoteDataset) else None
        self.stream = TokenStream(dataset, split)
        self.sequence_length = sequence_length
        self.num_samples = (self.stream.tokens - 1) // sequence_length
        if self.num_samples < 1:
            raise UserError(
                f"{dataset.folder}: split '{split}' has {self.stream.tokens:,} tokens, one sample needs "
                f"sequence_length + 1 = {sequence_length + 1:,}; lower sequence_length or prepare more text"
            )
        self.order: SampleOrder | WindowedOrder = SampleOrder(self.num_samples, seed)
        if window_tokens is not None:
            self.order = self._windowed(seed, window_tokens)
        self._prefetcher: ShardPrefetcher | None = None
        if self.remote is not None:
            check_cache([self])
            self._prefetcher = ShardPrefetcher(self.remote.shards(split), self.window_shards)

    def _windowed(self, seed: int, window_tokens: int) -> WindowedOrder:
        if window_tokens < self.sequence_length:
            raise UserError(
                f"window_tokens ({window_tokens:,}) must be at least sequence_length ({self.sequence_length:,})"
            )
        shard_tokens = -(-self.stream.tokens // self.stream.index.num_shards)
        block_tokens = min(_BLOCK_SHARDS * shard_tokens, window_tokens)
        block_samples = max(1, block_tokens // self.sequence_length)
        blocks_per_window = max(1, window_tokens // (block_samples * self.sequence_length))
        return WindowedOrder(self.num_samples, seed, block_samples, blocks_per_window)

    @property
    def cache_bytes(self) -> int:
        """What a remote dataset needs of its cache: the window that is read, and the next; 0 for a local one.

        A block of samples may begin and end in the middle of a shard, and its last target is the first token
        behind it.
        """
        if self.remote is None:
            return 0
        index = self.stream.index
        all_bytes = int(index.shards["bytes"].sum())
        if isinstance(self.order, SampleOrder):
            return all_bytes
        block_tokens = self.order.block_samples * self.sequence_length
        shards_a_block = block_tokens * index.num_shards // index.tokens + 2
        window_shards = self.order.blocks_per_window * shards_a_block + 1
        return min(all_bytes, 2 * window_shards * int(index.shards["bytes"].max()))

    def window_shards(self, window: int) -> Iterator[int]:
        """The shards that hold the samples of a window."""
        for first, last in (self.order.window_ranges(window) * self.sequence_length).tolist():
            yield from self.stream.shards_of(first, last + 1)

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the sample at each position; positions run on across epochs."""
        return self.order.sample_index(positions)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n, S + 1]: the tokens of each sample. Raises UserError naming a shard that fails."""
        starts = np.asarray(indices, dtype=np.int64) * self.sequence_length
        return self.stream.read_rows(starts, self.sequence_length + 1).astype(np.int64)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n, S + 1]: the tokens of the sample at each position."""
        return self.read(self.sample_indices(positions))

    def locate(self, sample: int) -> dict[str, Any]:
        """Where a sample lies, for a person: split, sample, token_offset in the split's stream, document (its number
        in the split) and, of a local dataset, document_id; of the document that the sample's first token is in."""
        index, offset = self.stream.index, sample * self.sequence_length
        chunk = int(np.searchsorted(index.token_start, offset, side="right")) - 1
        start = max(0, int(index.token_start[chunk]) - 1)
        before = self.stream.read(start, offset - start) if offset > start else np.empty(0)
        begun = int((before == self.dataset.manifest.tokenizer.eos_token_id).sum()) + int(index.token_start[chunk] == 0)
        document = int(index.document_start[chunk]) + begun - 1
        place = {"split": index.name, "sample": sample, "token_offset": offset, "document": document}
        if self.remote is None and (name := self._document_id(document)):
            place["document_id"] = name
        return place

    def _document_id(self, document: int) -> str | None:
        """From the list beside the shard that the document starts in; None where there is no such list."""
        index = self.stream.index
        chunk = int(np.searchsorted(index.document_start, document, side="right")) - 1
        shard = int(index.chunk_shard[min(chunk, len(index.chunk_shard) - 1)])
        first = int(index.document_start[int(index.shards["first_chunk"][shard])])
        try:
            with open(Path(self.dataset.folder) / index.ids_name(shard), encoding="utf-8") as lines:
                return str(json.loads(next(itertools.islice(lines, document - first, None))))
        except (OSError, StopIteration, ValueError):
            return None

    def ahead(self, position: int) -> None:
        """Fetches the remote shards of the window at `position` and of the next, in the background."""
        if self._prefetcher is not None:
            self._prefetcher.advance(self.order.window(position))

    def close(self) -> None:
        """Ends downloads ahead and closes the shards."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self.stream.close()


def check_cache(sources: Sequence[SampleSource]) -> None:
    """Raises UserError if what is read of one window would push out what is downloaded for the next."""
    remote = [(source, source.remote) for source in sources if source.remote is not None]
    for cache in {dataset.cache.folder: dataset.cache for _, dataset in remote}.values():
        sharing = [(source, dataset.url) for source, dataset in remote if dataset.cache.folder == cache.folder]
        needed_bytes = sum(source.cache_bytes for source, _ in sharing)
        if needed_bytes > cache.budget_bytes:
            names = ", ".join(f"{url} ({source.stream.index.name})" for source, url in sharing)
            raise UserError(
                f"{names}: needs a cache of {needed_bytes:,} bytes, the budget of {cache.folder} is "
                f"{cache.budget_bytes:,}; raise data.cache_bytes, or set data.window_tokens or lower it: "
                "two windows must fit"
            )

"""Datasets behind a URL: everything but the shards is copied to this node, the shards are read through a cache.

Each download is checked against the manifest, so a shard of a remote dataset needs no other verification.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from data_prep.errors import UserError
from data_prep.manifest import (
    HF_TOKENIZER_FILES,
    MANIFEST_NAME,
    MODEL_FILE,
    TOKENIZER_FOLDER,
    Dataset,
    SplitIndex,
    index_files,
    open_dataset,
    parse_manifest,
)
from data_prep.remote import read_whole
from pipeline.data.shard_cache import ShardCache
from pipeline.files import locked
from pipeline.settings.sections import DEFAULT_CACHE_BYTES, DEFAULT_CACHE_FOLDER

_log = logging.getLogger(__name__)

_DOWNLOAD_THREADS = 4


@dataclass(frozen=True)
class RemoteShards:
    """A split's shards at a URL, read through the cache."""

    url: str
    index: SplitIndex
    cache: ShardCache
    max_open: int = 16  # an open shard that has left the cache still takes its space on the disk

    def where(self, shard: int) -> str:
        return f"{self.url}/{self.index.shard_name(shard)}"

    def open(self, shard: int) -> int:
        """A descriptor of the whole, checked shard. Raises UserError naming its URL."""
        return self.cache.open(self.where(shard), self.index.shard_digest(shard), self.index.shard_bytes(shard))

    def touch(self, shard: int) -> bool:
        """Whether a shard is cached; if so, it is the last to be pushed out."""
        return self.cache.touch(self.index.shard_digest(shard))

    def fetch(self, shard: int) -> None:
        """Downloads a shard, unless it is cached or another process of the node is at it."""
        digest, num_bytes = self.index.shard_digest(shard), self.index.shard_bytes(shard)
        self.cache.fetch(self.where(shard), digest, num_bytes, wait=False)


@dataclass(frozen=True)
class RemoteDataset(Dataset):
    """A dataset whose shards stay at `url`; `folder` is this node's copy of its manifest and indexes."""

    url: str = field(kw_only=True)
    cache: ShardCache = field(kw_only=True)

    def shards(self, split: str) -> RemoteShards:
        return RemoteShards(self.url, self.split(split), self.cache)


def open_location(
    location: str | Path,
    cache_folder: str | Path = DEFAULT_CACHE_FOLDER,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Dataset:
    """Opens a dataset in a folder or, as a `RemoteDataset`, at a URL.

    Raises UserError as `open_dataset` does, and for what cannot be fetched.
    """
    if "://" not in str(location):
        return open_dataset(location)
    url = str(location).rstrip("/")
    cache = ShardCache(cache_folder, cache_bytes)
    content = read_whole(f"{url}/{MANIFEST_NAME}")
    manifest = parse_manifest(content, f"{url}/{MANIFEST_NAME}")
    files: dict[str, str | None] = {MODEL_FILE: manifest.tokenizer.sha256, **dict.fromkeys(HF_TOKENIZER_FILES)}
    files |= index_files(manifest)
    folder = cache.folder / "datasets" / manifest.dataset_id
    (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", wait=True):
        if not (folder / MANIFEST_NAME).exists():
            for name, sha256 in files.items():
                (folder / name).write_bytes(read_whole(f"{url}/{name}", sha256))
            (folder / MANIFEST_NAME).write_bytes(content)  # last: it says that the rest is there
    local = open_dataset(folder)
    return RemoteDataset(local.folder, local.manifest, local.indexes, url=url, cache=cache)


class ShardPrefetcher:
    """Downloads the shards of the window that is being read and of the next, a few at a time.

    What fails is left to the reader, which asks again and raises.

    Args:
        shards: where they come from.
        wanted: the shards of a window, by its number.
    """

    def __init__(self, shards: RemoteShards, wanted: Callable[[int], Iterable[int]]) -> None:
        self._shards = shards
        self._wanted = wanted
        self._window: int | None = None
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._stop = weakref.finalize(self, _stop, self._queue)
        for number in range(_DOWNLOAD_THREADS):
            Thread(target=_fetch_all, args=(shards, self._queue), name=f"shard-prefetch-{number}", daemon=True).start()

    def advance(self, window: int) -> None:
        """Says which window is being read; returns at once.

        What both windows already have is marked as used first, so that a download pushes out what is older.
        """
        if window == self._window:
            return
        self._window = window
        _drain(self._queue)
        wanted = dict.fromkeys([*self._wanted(window), *self._wanted(window + 1)])
        missing = [shard for shard in wanted if not self._shards.touch(shard)]
        if missing:
            _log.info("%s: downloading %d of the %d shards read next", self._shards.url, len(missing), len(wanted))
        for shard in missing:
            self._queue.put(shard)

    def close(self) -> None:
        """Ends the threads, each after the download it is in; does not wait for them."""
        _drain(self._queue)
        self._stop()


def _drain(queue: SimpleQueue[int | None]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass


def _stop(queue: SimpleQueue[int | None]) -> None:
    for _ in range(_DOWNLOAD_THREADS):
        queue.put(None)


def _fetch_all(shards: RemoteShards, queue: SimpleQueue[int | None]) -> None:
    while (shard := queue.get()) is not None:
        try:
            shards.fetch(shard)
        except UserError as error:
            _log.warning("download ahead failed, the reader will try again: %s", error)

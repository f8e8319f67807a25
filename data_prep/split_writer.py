"""One split of a dataset, written shard by shard: what is packed, counted, published and put into the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_prep.encode import Encoded
from data_prep.engines import OrderedMap
from data_prep.errors import UserError
from data_prep.hashing import digest_of
from data_prep.journal import Journal, ShardEntry
from data_prep.packing import END, Chunk, Piece, Position, pack
from data_prep.prepare_settings import PrepareProgress, PrepareSettings, in_order_of_work
from data_prep.shards import build_shard
from data_prep.store import WORK_FOLDER, Store


@dataclass
class Totals:
    """Sums over a run of tasks."""

    rows: int = 0
    task_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    source_bytes: int = 0
    words: int = 0
    lines: int = 0
    round_trip_documents: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    also_in: dict[str, int] = field(default_factory=dict)

    def add(self, encoded: Encoded) -> None:
        documents = encoded.documents
        self.rows += encoded.counts.rows
        self.task_bytes += encoded.task_bytes
        self.documents += len(documents)
        self.tokens += len(encoded.tokens)
        self.source_bytes += int(documents["bytes"].sum())
        self.words += int(documents["words"].sum())
        self.lines += int(documents["lines"].sum())
        self.round_trip_documents += int(documents["round_trip"].sum())
        for mine, theirs in (
            (self.dropped, encoded.counts.dropped),
            (self.changed, encoded.counts.changed),
        ):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count


def other_text(settings: PrepareSettings, name: str) -> str:
    """The line for a text that is another one than an unfinished preparation has read."""
    return (
        f"{settings.output}: holds an unfinished preparation of another text: {name} has changed since; "
        "restore it, or choose another folder (or delete this one) for the new text"
    )


class SplitWriter:
    """Encodes and publishes what is missing of one split."""

    def __init__(
        self,
        settings: PrepareSettings,
        store: Store,
        journal: Journal,
        split: str,
        known: dict[str, Digests],
        progress: Callable[[PrepareProgress], None],
    ) -> None:
        self._settings, self._store, self._journal = settings, store, journal
        self._split, self._known, self._progress = split, known, progress
        entries = journal.entries.get(split, [])
        self._shard = len(entries)
        self._totals = Totals(**json.loads(json.dumps(entries[-1].totals))) if entries else Totals()
        self._before = asdict(self._totals)  # the totals before the task being packed
        self._unrecorded: list[list[Any]] = []  # texts of tasks that are in no journal line yet
        last = split == in_order_of_work(settings.source.splits)[-1]
        saved = self._shard + (split in journal.finished_splits)
        self.digests = Digests(store, split, saved, settings.filters.drop_duplicates or not last)

    def run(self, encode: OrderedMap) -> None:
        """Raises UserError if the split has no document."""
        start = self._journal.counters(self._split)
        if start.position != END:
            pieces = self._pieces(encode, start.position)
            chunks: list[Chunk] = []
            for chunk in pack(pieces, self._settings.chunk_tokens, self._settings.tokenizer.dtype, start):
                chunks.append(chunk)
                if len(chunks) == self._settings.chunks_per_shard:
                    self._publish(chunks, chunk.next_position)
                    chunks = []
            if chunks:
                self._publish(chunks, END)
        if not self._totals.documents:
            raise UserError(self._nothing_there())
        if changed := self._settings.source.changed(self._split):
            raise UserError([f"{name}: changed while it was read; run the same command again" for name in changed])
        self.digests.save(self._shard, whole=True)
        self._journal.finish_split(self._split, asdict(self._totals), self._unrecorded)

    def _pieces(self, encode: OrderedMap, start: Position) -> Iterator[Piece]:
        source = self._settings.source
        total_bytes = source.total_bytes(self._split)
        for encoded in encode(source.tasks(self._split, start)):
            self._before = asdict(self._totals)
            self._compare_and_note(encoded)
            repeated = self.digests.find(encoded.documents["digest"])
            if self._settings.filters.drop_duplicates:
                encoded = encoded.without(repeated, "duplicate")
            self._totals.add(encoded)
            self._count_shared(encoded.documents["digest"])
            yield encoded.piece()
            totals = self._totals
            self._progress(
                PrepareProgress(
                    self._split,
                    totals.task_bytes,
                    total_bytes,
                    totals.documents,
                    totals.tokens,
                    self._shard,
                )
            )

    def _compare_and_note(self, encoded: Encoded) -> None:
        """The first task of a rerun was read before: it must be the same, since a part of it is in a shard."""
        digest = self._journal.texts.get(self._split, {}).get(encoded.position)
        if digest is None:
            self._unrecorded.append([*encoded.position, encoded.digest])
        elif digest != encoded.digest:
            raise UserError(other_text(self._settings, encoded.name))

    def _count_shared(self, digests: np.ndarray) -> None:
        for split, known in self._known.items():
            if shared := sum(digest in known for digest in map(bytes, digests)):
                self._totals.also_in[split] = self._totals.also_in.get(split, 0) + shared

    def _publish(self, chunks: list[Chunk], next_position: Position) -> None:
        """Publishes a shard, then its journal line."""
        shard = build_shard(chunks)
        ids = _json_lines([id for chunk in chunks for id in chunk.ids])
        stem = f"{self._split}-{self._shard:06d}"
        self._store.publish(f"{stem}.ids.jsonl", ids)
        self._store.publish(f"{stem}.tar", shard.content)
        self.digests.save(self._shard)
        last = chunks[-1]
        self._journal.add(
            ShardEntry(
                split=self._split,
                shard=self._shard,
                bytes=len(shard.content),
                sha256=digest_of(shard.content, "sha256").hex,
                blake3=digest_of(shard.content, "blake3").hex,
                ids_bytes=len(ids),
                ids_sha256=digest_of(ids, "sha256").hex,
                ids_blake3=digest_of(ids, "blake3").hex,
                chunks=[
                    [chunk.token_start, chunk.document_start, offset]
                    for chunk, offset in zip(chunks, shard.data_offsets, strict=True)
                ],
                tokens_end=last.token_start + len(last.tokens),
                documents_end=last.document_start + len(last.ids),
                next_position=next_position,
                next_offset=last.next_offset,
                texts=self._unrecorded,
                totals=asdict(self._totals) if next_position == END else self._before,
            )
        )
        self._shard += 1
        self._unrecorded = []

    def _nothing_there(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self._totals.dropped.items())
        return (
            f"{self._settings.source.name}: split '{self._split}' has no document"
            + (f" left (dropped: {dropped})" if dropped else "")
            + "; check the source's path, the filters, and the shares of the splits"
        )


def _json_lines(values: list[str]) -> bytes:
    """A JSON string per line."""
    lines = json.dumps(values, ensure_ascii=False, separators=("\n", ":"))[1:-1]
    return (lines + "\n").encode() if values else b""


class Digests:
    """The digests of a split's documents so far; saved with each shard, so that a rerun knows them.

    Args:
        wanted: whether anybody will ask for them; if not, none are kept.
    """

    def __init__(self, store: Store, split: str, shards: int, wanted: bool) -> None:
        self._store, self._split, self._wanted = store, split, wanted
        self._seen: set[bytes] = set()
        self._unsaved: list[bytes] = []  # of the tasks before the current one
        self._current: list[bytes] = []
        for shard in range(shards if wanted else 0):
            saved = store.read(self._name(shard)) or b""
            self._seen.update(saved[i : i + 16] for i in range(0, len(saved), 16))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._seen

    def _name(self, shard: int) -> str:
        return f"{WORK_FOLDER}/digests-{self._split}-{shard:06d}"

    def find(self, digests: np.ndarray) -> np.ndarray:
        """[D] bool: which of a task's documents were met before."""
        self._unsaved += self._current
        self._current = []
        found = np.zeros(len(digests), bool)
        for number, digest in enumerate(map(bytes, digests if self._wanted else ())):
            if digest in self._seen:
                found[number] = True
            else:
                self._seen.add(digest)
                self._current.append(digest)
        return found

    def save(self, shard: int, whole: bool = False) -> None:
        """Saves those of the tasks before the current one, which a rerun encodes again; of all if `whole`."""
        if not self._wanted:
            return
        if whole:
            self._unsaved += self._current
            self._current = []
        self._store.publish(self._name(shard), b"".join(self._unsaved))
        self._unsaved = []

"""The stage: text in, a whole dataset folder out, on any number of workers, from wherever it stopped.

Workers encode tasks; this process takes their results in order, packs them into chunks, publishes shards,
and writes a journal line for each. Nothing depends on who encoded what, or when: the bytes are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import Source
from data_prep.encode import Encoded, Encoder, Filters
from data_prep.engines import Engine, OrderedMap, ProcessEngine
from data_prep.errors import UserError
from data_prep.journal import Journal, ShardEntry
from data_prep.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_RECORD,
    TOKENIZER_FOLDER,
    Manifest,
    SourceInfo,
    SplitInfo,
    parse_manifest,
)
from data_prep.packing import END, Chunk, Piece, Position, pack
from data_prep.shards import build_shard
from data_prep.store import WORK_FOLDER, Store, open_store
from data_prep.tokenizer import Tokenizer
from data_prep.twin import tokenizer_files

# 8 MiB a member and 32 MiB a shard: a chunk costs about 1,900 bytes of tar and .npy headers and padding, and
# 4 bytes a document, in all less than a thousandth of its tokens at the lengths of Wikipedia's articles.
CHUNK_TOKENS = 1 << 22
CHUNKS_PER_SHARD = 4


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and where.

    Attributes:
        source: where the text comes from.
        tokenizer: what makes it tokens.
        output: the dataset folder, or an fsspec URL.
        filters: what to leave out; nothing by default.
        engine: who encodes; this process alone by default.
        chunk_tokens: tokens a chunk.
        chunks_per_shard: chunks a tar.
    """

    source: Source
    tokenizer: Tokenizer
    output: str | Path
    filters: Filters = field(default_factory=Filters)
    engine: Engine = field(default_factory=lambda: ProcessEngine(1))
    chunk_tokens: int = CHUNK_TOKENS
    chunks_per_shard: int = CHUNKS_PER_SHARD

    def subject(self) -> dict[str, Any]:
        """What makes the dataset what it is, as JSON values: a rerun goes on only with the same."""
        source = self.source
        info = SourceInfo(name=source.name, settings=source.settings, fingerprint=source.fingerprint())
        subject = {
            "format_version": FORMAT_VERSION,
            "source": info.model_dump(),
            "tokenizer": self.tokenizer.info.model_dump(),
            "chunk_tokens": self.chunk_tokens,
            "chunks_per_shard": self.chunks_per_shard,
            "filters": self.filters.settings(),
        }
        return json.loads(json.dumps(subject))


@dataclass(frozen=True)
class PrepareProgress:
    """Where a preparation stands, told after every task. `total_bytes` is None where nobody knows it;
    everything counts from the start of the split, what an earlier attempt did included."""

    split: str
    done_bytes: int
    total_bytes: int | None
    documents: int
    tokens: int
    shards: int


@dataclass
class Totals:
    """What was counted in a run of tasks; adds up."""

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


def prepare(settings: PrepareSettings, progress: Callable[[PrepareProgress], None] = lambda _: None) -> Manifest:
    """Makes the dataset folder, or goes on making it; returns its manifest.

    The same settings and the same text give the same bytes, whatever the engine, and however often the
    work was interrupted. Where the folder already holds this very dataset, it is left as it is.

    Raises UserError if the folder holds something else or is in use, the source cannot be read or holds
    no document, a document does not survive encoding, or the target cannot be written.
    """
    subject = settings.subject()
    if manifest := finished(settings.output, subject):
        return manifest
    store = open_store(settings.output)
    with closing(Journal(store, subject)) as journal:
        if manifest := finished(settings.output, subject):  # another process was faster
            return manifest
        files = tokenizer_files(settings.tokenizer)
        with settings.engine.start(Encoder(settings.tokenizer, settings.filters)) as encode:
            for split in settings.source.splits:
                if split not in journal.finished_splits:
                    _SplitWriter(settings, store, journal, split, progress).run(encode)
        splits = {split: _write_indexes(settings, store, journal, split) for split in settings.source.splits}
        for name, content in files.items():
            store.publish(f"{TOKENIZER_FOLDER}/{name}", content)
        manifest = Manifest(**subject, splits=splits)
        store.publish(MANIFEST_NAME, manifest.to_json())
        store.remove_work_folder()
    return manifest


def finished(output: str | Path, subject: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished dataset of the same subject; None if there is none.

    Raises UserError if the folder holds a finished dataset of something else.
    """
    content = open_store(output).read(MANIFEST_NAME)
    if content is None:
        return None
    manifest = parse_manifest(content, f"{output}/{MANIFEST_NAME}")
    there = json.loads(json.dumps(manifest.model_dump(exclude={"splits"})))
    if changed := [key for key in subject if there[key] != subject[key]]:
        raise UserError(
            f"{output}: already holds a dataset with another {', '.join(changed)} "
            f"(id {manifest.dataset_id[:16]}); choose another folder, or delete this one"
        )
    return manifest


class _SplitWriter:
    """Encodes and publishes what is missing of one split."""

    def __init__(
        self,
        settings: PrepareSettings,
        store: Store,
        journal: Journal,
        split: str,
        progress: Callable[[PrepareProgress], None],
    ) -> None:
        self._settings, self._store, self._journal = settings, store, journal
        self._split, self._progress = split, progress
        entries = journal.entries.get(split, [])
        self._shard = len(entries)
        self._totals = Totals(**json.loads(json.dumps(entries[-1].totals))) if entries else Totals()
        self._before = asdict(self._totals)  # the totals before the task being packed
        self._duplicates = _Duplicates(store, split, self._shard) if settings.filters.drop_duplicates else None

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
        self._journal.finish_split(self._split, asdict(self._totals))

    def _pieces(self, encode: OrderedMap, start: Position) -> Iterator[Piece]:
        source = self._settings.source
        total_bytes = source.total_bytes(self._split)
        for encoded in encode(source.tasks(self._split, start)):
            self._before = asdict(self._totals)
            if self._duplicates:
                encoded = encoded.without(self._duplicates.find(encoded.documents["digest"]), "duplicate")
            self._totals.add(encoded)
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

    def _publish(self, chunks: list[Chunk], next_position: Position) -> None:
        """Publishes a shard, then its journal line."""
        shard = build_shard(chunks)
        ids = "".join(json.dumps(id, ensure_ascii=False) + "\n" for chunk in chunks for id in chunk.ids).encode()
        stem = f"{self._split}-{self._shard:06d}"
        self._store.publish(f"{stem}.ids.jsonl", ids)
        self._store.publish(f"{stem}.tar", shard.content)
        if self._duplicates:
            self._duplicates.save(self._shard)
        last = chunks[-1]
        self._journal.add(
            ShardEntry(
                split=self._split,
                shard=self._shard,
                bytes=len(shard.content),
                sha256=shard.sha256,
                ids_bytes=len(ids),
                ids_sha256=hashlib.sha256(ids).hexdigest(),
                chunks=[
                    [chunk.token_start, chunk.document_start, offset]
                    for chunk, offset in zip(chunks, shard.data_offsets, strict=True)
                ],
                tokens_end=last.token_start + len(last.tokens),
                documents_end=last.document_start + len(last.ids),
                next_position=next_position,
                next_offset=last.next_offset,
                totals=asdict(self._totals) if next_position == END else self._before,
            )
        )
        self._shard += 1

    def _nothing_there(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self._totals.dropped.items())
        return (
            f"{self._settings.source.name}: split '{self._split}' has no document"
            + (f" left (dropped: {dropped})" if dropped else "")
            + "; check the source's path, the filters, and the shares of the splits"
        )


class _Duplicates:
    """The digests of a split's documents so far; saved with each shard, so that a rerun knows them."""

    def __init__(self, store: Store, split: str, shards: int) -> None:
        self._store, self._split = store, split
        self._seen: set[bytes] = set()
        self._unsaved: list[bytes] = []  # of the tasks before the current one
        self._current: list[bytes] = []
        for shard in range(shards):
            saved = store.read(self._name(shard)) or b""
            self._seen.update(saved[i : i + 16] for i in range(0, len(saved), 16))

    def _name(self, shard: int) -> str:
        return f"{WORK_FOLDER}/digests-{self._split}-{shard:06d}"

    def find(self, digests: np.ndarray) -> np.ndarray:
        """[D] bool: which of a task's documents were met before."""
        self._unsaved += self._current
        self._current = []
        found = np.zeros(len(digests), bool)
        for number, digest in enumerate(map(bytes, digests)):
            if digest in self._seen:
                found[number] = True
            else:
                self._seen.add(digest)
                self._current.append(digest)
        return found

    def save(self, shard: int) -> None:
        """A rerun encodes the current task again, so that its digests are not among those saved."""
        self._store.publish(self._name(shard), b"".join(self._unsaved))
        self._unsaved = []


def _write_indexes(settings: PrepareSettings, store: Store, journal: Journal, split: str) -> SplitInfo:
    """Writes a split's two index files from its journal entries, after a look at the shards' sizes."""
    entries, totals = journal.entries[split], journal.finished_splits[split]
    problems: list[str] = []
    shards = np.zeros(len(entries), SHARD_RECORD)
    rows: list[list[int]] = []
    for entry in entries:
        for name, expected in (("tar", entry.bytes), ("ids.jsonl", entry.ids_bytes)):
            actual = store.size(f"{split}-{entry.shard:06d}.{name}")
            if actual != expected:
                problems.append(
                    f"{store.where}/{split}-{entry.shard:06d}.{name}: {actual or 0:,} bytes, written were "
                    f"{expected:,}; something else changed it: delete the folder and prepare again"
                )
        sha256, ids_sha256 = bytes.fromhex(entry.sha256), bytes.fromhex(entry.ids_sha256)
        shards[entry.shard] = (entry.bytes, sha256, len(rows), entry.ids_bytes, ids_sha256)
        rows += [[start, document, entry.shard, offset] for start, document, offset in entry.chunks]
    if problems:
        raise UserError(problems)
    last = entries[-1]
    rows.append([last.tokens_end, last.documents_end, len(entries), 0])
    hashes = {}
    for name, array in (("shards", shards), ("chunks", np.ascontiguousarray(np.array(rows, "<u8").T))):
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        store.publish(f"{split}.{name}.npy", content.getvalue())
        hashes[name] = hashlib.sha256(content.getvalue()).hexdigest()
    return SplitInfo(
        shards=len(entries),
        chunks=len(rows) - 1,
        tokens=last.tokens_end,
        documents=last.documents_end,
        source_bytes=totals["source_bytes"],
        source_rows=totals["rows"],
        words=totals["words"],
        lines=totals["lines"],
        dtype="<u2" if settings.tokenizer.dtype.itemsize == 2 else "<u4",
        dropped=totals["dropped"],
        changed=totals["changed"],
        round_trip_documents=totals["round_trip_documents"],
        shards_index_sha256=hashes["shards"],
        chunks_index_sha256=hashes["chunks"],
    )

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import Source
from data_prep.encode import Encoded, Encoder, Filters
from data_prep.engines import Engine, ProcessEngine
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
    check_file,
    read_manifest,
)
from data_prep.packing import START, Chunk, ChunkCounters, Piece, Position, pack
from data_prep.shards import build_shard, publish
from data_prep.tokenizer import Tokenizer
from data_prep.twin import tokenizer_files

CHUNK_TOKENS = 1 << 20
CHUNKS_PER_SHARD = 16


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and where.

    Attributes:
        source: where the text comes from.
        tokenizer: what makes it tokens.
        output: the dataset folder.
        filters: what to leave out; nothing by default.
        engine: who encodes; this process alone by default.
        chunk_tokens: tokens a chunk.
        chunks_per_shard: chunks a tar.
    """

    source: Source
    tokenizer: Tokenizer
    output: Path
    filters: Filters = field(default_factory=Filters)
    engine: Engine = field(default_factory=lambda: ProcessEngine(1))
    chunk_tokens: int = CHUNK_TOKENS
    chunks_per_shard: int = CHUNKS_PER_SHARD

    def subject(self) -> dict[str, Any]:
        """What makes the dataset what it is, as JSON values: a rerun goes on only with the same."""
        subject = {
            "format_version": FORMAT_VERSION,
            "source": self.source_info().model_dump(),
            "tokenizer": self.tokenizer.info.model_dump(),
            "chunk_tokens": self.chunk_tokens,
            "chunks_per_shard": self.chunks_per_shard,
            "filters": self.filters.settings(),
        }
        return json.loads(json.dumps(subject))

    def source_info(self) -> SourceInfo:
        source = self.source
        return SourceInfo(name=source.name, settings=source.settings, fingerprint=source.fingerprint())


@dataclass(frozen=True)
class PrepareProgress:
    """Where a preparation stands, told after every task. `total_bytes` is None where nobody knows it;
    `done_bytes` counts the source, what an earlier attempt did included."""

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
        self.rows += encoded.rows
        self.task_bytes += encoded.task_bytes
        self.documents += len(encoded.piece.ids)
        self.tokens += len(encoded.piece.tokens)
        self.source_bytes += encoded.source_bytes
        self.words += encoded.words
        self.lines += encoded.lines
        self.round_trip_documents += encoded.round_trip_documents
        for mine, theirs in ((self.dropped, encoded.dropped), (self.changed, encoded.changed)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count

    def snapshot(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.__dict__))


Progress = Callable[[PrepareProgress], None]


def prepare(settings: PrepareSettings, progress: Progress = lambda _: None) -> Manifest:
    """Makes the dataset folder, or goes on making it; returns its manifest.

    The same settings and the same text give the same bytes, whatever the engine, and however often the
    work was interrupted. Where the folder already holds this very dataset, it is left as it is.

    Raises UserError if the folder holds something else or is in use, the source cannot be read or holds
    no document, a document does not survive encoding, or the target cannot be written.
    """
    subject = settings.subject()
    if manifest := finished(settings.output, subject):
        return manifest
    journal = Journal(settings.output, subject)
    with closing(journal):
        if manifest := finished(settings.output, subject):  # another process was faster
            return manifest
        splits = {}
        for split in settings.source.splits:
            totals = journal.finished_splits.get(split)
            if totals is None:
                totals = _prepare_split(settings, split, journal, progress)
            splits[split] = _write_indexes(settings, split, journal.split_entries(split), totals)
        folder = settings.output / TOKENIZER_FOLDER
        folder.mkdir(exist_ok=True)
        for name, content in tokenizer_files(settings.tokenizer).items():
            publish(folder / name, content)
        manifest = Manifest(**subject, splits=splits)
        publish(settings.output / MANIFEST_NAME, manifest.to_json())
        journal.remove()
    return manifest


def finished(output: Path, subject: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished dataset of the same subject; None if there is none.

    Raises UserError if the folder holds a finished dataset of something else.
    """
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(output)
    there = json.loads(json.dumps(manifest.model_dump(exclude={"splits"})))
    if changed := [key for key in subject if there[key] != subject[key]]:
        raise UserError(
            f"{output}: already holds a dataset with another {', '.join(changed)} "
            f"(id {manifest.dataset_id[:16]}); choose another folder, or delete this one"
        )
    return manifest


def _prepare_split(settings: PrepareSettings, split: str, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Encodes and publishes what is missing of a split; returns its totals."""
    entries = journal.split_entries(split)
    totals = Totals()
    counters = ChunkCounters()
    if entries:
        last = entries[-1]
        if tuple(last.next_position) < START:
            journal.finish_split(split, last.totals)
            return last.totals
        totals = Totals(**last.totals)
        counters = ChunkCounters(
            chunk=sum(len(entry.chunks) for entry in entries),
            token=last.tokens_end,
            document=last.documents_end,
            position=Position(*last.next_position),
            offset=last.next_offset,
        )
    writer = _ShardWriter(settings, split, journal, len(entries))
    before: dict[Position, dict[str, Any]] = {}  # totals before the tasks that the next shard may begin in
    total_bytes = settings.source.total_bytes(split)

    def pieces() -> Iterator[Piece]:
        tasks = settings.source.tasks(split, counters.position)
        for encoded in settings.engine.map(Encoder(settings.tokenizer, settings.filters), tasks):
            before.clear()
            before[encoded.piece.position] = totals.snapshot()
            totals.add(encoded)
            yield encoded.piece
            progress(
                PrepareProgress(split, totals.task_bytes, total_bytes, totals.documents, totals.tokens, writer.shard)
            )

    for chunk in pack(pieces(), settings.chunk_tokens, settings.tokenizer.dtype, counters):
        writer.add(chunk, before.get(chunk.next_position) or totals.snapshot())
    writer.flush(totals.snapshot(), end=True)
    if not totals.documents:
        raise UserError(_empty_split(settings, split, totals))
    journal.finish_split(split, totals.snapshot())
    return totals.snapshot()


def _empty_split(settings: PrepareSettings, split: str, totals: Totals) -> str:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in totals.dropped.items())
    return (
        f"{settings.source.name}: split '{split}' has no document"
        + (f" left ({left_out} dropped)" if left_out else "")
        + "; check the source's path, its filters and the shares of its splits"
    )


class _ShardWriter:
    """Collects chunks; publishes a shard, then its journal line."""

    def __init__(self, settings: PrepareSettings, split: str, journal: Journal, shard: int) -> None:
        self._settings = settings
        self._split = split
        self._journal = journal
        self._chunks: list[Chunk] = []
        self.shard = shard

    def add(self, chunk: Chunk, totals: dict[str, Any]) -> None:
        """`totals`: what was counted in the tasks before the one the next chunk begins in."""
        self._chunks.append(chunk)
        if len(self._chunks) == self._settings.chunks_per_shard:
            self.flush(totals)

    def flush(self, totals: dict[str, Any], end: bool = False) -> None:
        if not self._chunks:
            return
        stem = self._settings.output / f"{self._split}-{self.shard:06d}"
        shard = build_shard(self._chunks)
        ids = b"".join(
            json.dumps(id, ensure_ascii=False).encode() + b"\n" for chunk in self._chunks for id in chunk.ids
        )
        publish(stem.with_suffix(".ids.jsonl"), ids)
        publish(stem.with_suffix(".tar"), shard.content)
        last = self._chunks[-1]
        self._journal.add(
            ShardEntry(
                split=self._split,
                shard=self.shard,
                bytes=len(shard.content),
                sha256=shard.sha256,
                ids_bytes=len(ids),
                ids_sha256=hashlib.sha256(ids).hexdigest(),
                chunks=[
                    [chunk.token_start, chunk.document_start, offset]
                    for chunk, offset in zip(self._chunks, shard.data_offsets, strict=True)
                ],
                tokens_end=last.token_start + len(last.tokens),
                documents_end=last.document_start + len(last.ids),
                next_position=[-1, -1] if end else list(last.next_position),
                next_offset=last.next_offset,
                totals=totals,
            )
        )
        self._chunks = []
        self.shard += 1


def _write_indexes(
    settings: PrepareSettings, split: str, entries: list[ShardEntry], totals: dict[str, Any]
) -> SplitInfo:
    """Writes a split's two index files from its journal entries, after a look at the shards' sizes."""
    problems: list[str] = []
    shards = np.zeros(len(entries), SHARD_RECORD)
    rows: list[list[int]] = []
    for entry in entries:
        stem = settings.output / f"{split}-{entry.shard:06d}"
        problems += check_file(stem.with_suffix(".tar"), entry.bytes, None)
        problems += check_file(stem.with_suffix(".ids.jsonl"), entry.ids_bytes, None)
        sha256, ids_sha256 = bytes.fromhex(entry.sha256), bytes.fromhex(entry.ids_sha256)
        shards[entry.shard] = (entry.bytes, sha256, len(rows), entry.ids_bytes, ids_sha256)
        rows += [[start, document, entry.shard, offset] for start, document, offset in entry.chunks]
    if problems:
        raise UserError(problems)
    last = entries[-1]
    rows.append([last.tokens_end, last.documents_end, len(entries), 0])
    hashes = {}
    for name, array in (("shards", shards), ("chunks", np.array(rows, "<u8").T)):
        content = io.BytesIO()
        np.save(content, np.ascontiguousarray(array), allow_pickle=False)
        publish(settings.output / f"{split}.{name}.npy", content.getvalue())
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

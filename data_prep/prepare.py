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
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Encoded, Encoder, Filters, digest_task
from data_prep.engines import Engine, InProcess, OrderedMap
from data_prep.errors import UserError
from data_prep.journal import Journal, ShardEntry
from data_prep.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_RECORD,
    TEXT_RECORD,
    TOKENIZER_FOLDER,
    Manifest,
    SourceInfo,
    SplitInfo,
    parse_manifest,
    texts_name,
)
from data_prep.packing import END, START, Chunk, Piece, Position, pack
from data_prep.shards import build_shard
from data_prep.sources.documents import TextSource
from data_prep.store import WORK_FOLDER, Store, open_store
from data_prep.tokenizers.hf_tokenizer import tokenizer_files
from data_prep.tokenizers.tokenizer import Tokenizer

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

    source: TextSource
    tokenizer: Tokenizer
    output: str | Path
    filters: Filters = field(default_factory=Filters)
    engine: Engine = field(default_factory=InProcess)
    chunk_tokens: int = CHUNK_TOKENS
    chunks_per_shard: int = CHUNKS_PER_SHARD

    def subject(self) -> dict[str, Any]:
        """What makes the dataset what it is, as JSON values: a rerun goes on only with the same."""
        source = self.source
        info = SourceInfo(name=source.name, settings=source.settings, fingerprint=source.fingerprint())
        subject = {
            "format_version": FORMAT_VERSION,
            "source": info.model_dump(exclude={"texts"}),
            "splits": source.splits,
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


def prepare(settings: PrepareSettings, progress: Callable[[PrepareProgress], None] = lambda _: None) -> Manifest:
    """Makes the dataset folder, or goes on making it; returns its manifest.

    The same settings and the same text give the same bytes, whatever the engine, and however often the
    work was interrupted. Where the folder already holds this very dataset, it is left as it is.

    Raises UserError if the folder holds something else or is in use, the source cannot be read or holds
    no document, a document does not survive encoding, or the target cannot be written.
    """
    if manifest := finished(settings):
        return manifest
    store = open_store(settings.output)
    subject = settings.subject()
    with closing(Journal(store, subject)) as journal:
        if manifest := finished(settings):  # another process was faster
            return manifest
        files = tokenizer_files(settings.tokenizer)
        _compare_with_journal(settings, journal)
        known: dict[str, _Digests] = {}  # of the splits done so far
        with settings.engine.start(Encoder(settings.tokenizer, settings.filters)) as encode:
            for split in _in_order_of_work(settings.source.splits):
                writer = _SplitWriter(settings, store, journal, split, known, progress)
                if split not in journal.finished_splits:
                    writer.run(encode)
                known[split] = writer.digests
        splits = {split: _write_indexes(settings, store, journal, split) for split in settings.source.splits}
        if settings.source.fingerprint() is None:
            subject["source"]["texts"] = {split: _write_texts(store, journal, split) for split in splits}
        for name, content in files.items():
            store.publish(f"{TOKENIZER_FOLDER}/{name}", content)
        manifest = Manifest(**{**subject, "splits": splits})
        store.publish(MANIFEST_NAME, manifest.to_json())
        store.remove_work_folder()
    return manifest


def _in_order_of_work(splits: list[str]) -> list[str]:
    """Train comes last: of the others, which are small, the digests of all documents are kept to compare with."""
    return sorted(splits, key=lambda split: split == "train")


def finished(settings: PrepareSettings) -> Manifest | None:
    """The manifest of a finished dataset of the same text and settings; None if there is none.

    The text is read, where nothing else names it, and compared with what was read then.

    Raises UserError if the folder holds a finished dataset of something else.
    """
    store = open_store(settings.output)
    content = store.read(MANIFEST_NAME)
    if content is None:
        return None
    manifest = parse_manifest(content, f"{settings.output}/{MANIFEST_NAME}")
    id = manifest.dataset_id[:16]
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{settings.output}: holds a dataset of format version {manifest.format_version} (id {id}), which does not "
            "say what text it was made of; use it as it is, or choose another folder"
        )
    there = json.loads(json.dumps(manifest.model_dump(exclude={"source": {"texts"}})))
    there["splits"] = list(there["splits"])
    subject = settings.subject()
    if changed := [key for key in subject if there[key] != subject[key]]:
        raise UserError(
            f"{settings.output}: already holds a dataset with another {', '.join(changed)} (id {id}); "
            "choose another folder, or delete this one"
        )
    if manifest.source.texts:
        with settings.engine.start(digest_task) as digests:
            for split, sha256 in manifest.source.texts.items():
                recorded = _read_texts(store, split, sha256)
                if other := _differing_task(settings, digests, split, recorded, END):
                    raise UserError(
                        f"{settings.output}: already holds the dataset of another text (id {id}): {other} has changed "
                        "since; choose another folder, or delete this one"
                    )
    return manifest


def _compare_with_journal(settings: PrepareSettings, journal: Journal) -> None:
    """Reads again what an earlier attempt has read: half of one text and half of another is no dataset."""
    if settings.source.fingerprint() is not None or not journal.entries:
        return
    with settings.engine.start(digest_task) as digests:
        for split, entries in journal.entries.items():
            stop = END if split in journal.finished_splits else entries[-1].next_position
            if other := _differing_task(settings, digests, split, journal.texts[split], stop):
                raise UserError(_other_text(settings, other))


def _other_text(settings: PrepareSettings, name: str) -> str:
    return (
        f"{settings.output}: holds an unfinished preparation of another text: {name} has changed since; "
        "restore it, or choose another folder (or delete this one) for the new text"
    )


def _differing_task(
    settings: PrepareSettings, digests: OrderedMap, split: str, recorded: dict[Position, str], stop: Position
) -> str | None:
    """The name of the first task before `stop` that does not hold what was recorded; None if all do."""
    left = {position for position in recorded if stop == END or position < stop}
    tasks: Iterator[Any] = settings.source.tasks(split, START)
    if stop != END:
        tasks = takewhile(lambda task: task.position < stop, tasks)
    for position, name, digest in digests(tasks):
        if recorded.get(position) != digest:
            return name
        left.discard(position)
    return f"split '{split}' (some of its files are gone)" if left else None


class _SplitWriter:
    """Encodes and publishes what is missing of one split."""

    def __init__(
        self,
        settings: PrepareSettings,
        store: Store,
        journal: Journal,
        split: str,
        known: dict[str, _Digests],
        progress: Callable[[PrepareProgress], None],
    ) -> None:
        self._settings, self._store, self._journal = settings, store, journal
        self._split, self._known, self._progress = split, known, progress
        entries = journal.entries.get(split, [])
        self._shard = len(entries)
        self._totals = Totals(**json.loads(json.dumps(entries[-1].totals))) if entries else Totals()
        self._before = asdict(self._totals)  # the totals before the task being packed
        self._unrecorded: list[list[Any]] = []  # texts of tasks that are in no journal line yet
        last = split == _in_order_of_work(settings.source.splits)[-1]
        saved = self._shard + (split in journal.finished_splits)
        self.digests = _Digests(store, split, saved, settings.filters.drop_duplicates or not last)

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
            raise UserError(_other_text(self._settings, encoded.name))

    def _count_shared(self, digests: np.ndarray) -> None:
        for split, known in self._known.items():
            if shared := sum(digest in known for digest in map(bytes, digests)):
                self._totals.also_in[split] = self._totals.also_in.get(split, 0) + shared

    def _publish(self, chunks: list[Chunk], next_position: Position) -> None:
        """Publishes a shard, then its journal line."""
        shard = build_shard(chunks)
        ids = "".join(json.dumps(id, ensure_ascii=False) + "\n" for chunk in chunks for id in chunk.ids).encode()
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


class _Digests:
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
        also_in=totals["also_in"],
        shards_index_sha256=hashes["shards"],
        chunks_index_sha256=hashes["chunks"],
    )


def _write_texts(store: Store, journal: Journal, split: str) -> str:
    """Writes what was read for a split, per task; returns the file's sha256."""
    texts = journal.texts[split]
    records = np.array([(*position, bytes.fromhex(digest)) for position, digest in sorted(texts.items())], TEXT_RECORD)
    content = io.BytesIO()
    np.save(content, records, allow_pickle=False)
    store.publish(texts_name(split), content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _read_texts(store: Store, split: str, sha256: str) -> dict[Position, str]:
    content = store.read(texts_name(split)) or b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{store.where}/{texts_name(split)}: missing or changed; restore it, or choose another folder")
    records = np.load(io.BytesIO(content), allow_pickle=False)
    return {Position(int(r["unit"]), int(r["part"])): bytes(r["digest"]).hex() for r in records}

"""The diary of a preparation: one line per finished shard, from which a killed run goes on.

It lies in `DATASET/.prepare/journal-*.jsonl`. Its first line says what is being prepared; a rerun with
anything else is refused. A line counts once its newline is there; a torn last line is as if never written,
and its shard is simply made again, byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from data_prep.errors import UserError
from data_prep.packing import ChunkCounters, Position
from data_prep.store import WORK_FOLDER, Store

SEGMENT_LINES = 256  # a file of the journal: an object store rewrites it with every line
Totals = dict[str, Any]


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard.

    Attributes:
        chunks: [token_start, document_start, data_offset] of each chunk.
        tokens_end, documents_end: counted to the end of the shard.
        next_position, next_offset: the task, and the token in it, with which the next shard begins;
            `packing.END` after the last one.
        texts: [unit, part, digest] of each task whose documents are met here first.
        totals: what was counted in the tasks before that one.
    """

    split: str
    shard: int
    bytes: int
    sha256: str
    blake3: str
    ids_bytes: int
    ids_sha256: str
    ids_blake3: str
    chunks: list[list[int]]
    tokens_end: int
    documents_end: int
    next_position: Position
    next_offset: int
    texts: list[list[Any]]
    totals: Totals


class Journal:
    """Locks a dataset folder and opens its journal.

    Args:
        store: the dataset folder.
        subject: what is being prepared, as JSON values.

    Raises UserError if another process prepares into the folder, if the folder holds an unfinished
    preparation of something else, or if it holds files that are no dataset.
    """

    def __init__(self, store: Store, subject: dict[str, Any]) -> None:
        self._store = store
        strangers = store.names()
        if strangers and WORK_FOLDER not in strangers:
            shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
            raise UserError(f"{store.where}: holds other files ({shown}); choose a new or empty folder")
        store.lock()
        self.entries: dict[str, list[ShardEntry]] = {}
        self.finished_splits: dict[str, Totals] = {}
        self.texts: dict[str, dict[Position, str]] = {}  # by split, the digest of each task that was read
        self._segment = 0
        self._content = b""
        try:
            self._open(subject)
        except BaseException:
            store.unlock()
            raise

    def _name(self, segment: int) -> str:
        return f"{WORK_FOLDER}/journal-{segment:06d}.jsonl"

    def _open(self, subject: dict[str, Any]) -> None:
        records: list[dict[str, Any]] = []
        for segment in count():
            content = self._store.read(self._name(segment))
            if content is None:
                break
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                self._store.publish(self._name(segment), whole)
            self._segment, self._content = segment, whole
            records += [json.loads(line) for line in whole.splitlines()]
        if records and records[0] != subject:
            if len(records) > 1:
                raise UserError(_differences(self._store.where, records[0], subject))
            records = []  # nothing was published yet
            self._store.publish(self._name(0), b"")
            self._content = b""
        for record in records[1:]:
            if "finished_split" in record:
                self.finished_splits[record["finished_split"]] = record["totals"]
                self._add_texts(record["finished_split"], record["texts"])
            else:
                entry = ShardEntry(**{**record, "next_position": Position(*record["next_position"])})
                self.entries.setdefault(entry.split, []).append(entry)
                self._add_texts(entry.split, entry.texts)
        if not records:
            self._append(subject)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if self._content.count(b"\n") >= SEGMENT_LINES:
            self._segment, self._content = self._segment + 1, b""
        self._store.append(self._name(self._segment), self._content, line)
        self._content += line

    def add(self, entry: ShardEntry) -> None:
        """Records a shard that was published."""
        self._append(asdict(entry))
        self.entries.setdefault(entry.split, []).append(entry)
        self._add_texts(entry.split, entry.texts)

    def finish_split(self, split: str, totals: Totals, texts: list[list[Any]]) -> None:
        """Records that a split has no further shard; `texts` of tasks that are in none of its entries."""
        self._append({"finished_split": split, "totals": totals, "texts": texts})
        self.finished_splits[split] = totals
        self._add_texts(split, texts)

    def _add_texts(self, split: str, texts: list[list[Any]]) -> None:
        known = self.texts.setdefault(split, {})
        known.update((Position(unit, part), digest) for unit, part, digest in texts)

    def counters(self, split: str) -> ChunkCounters:
        """The place where the next shard of a split begins."""
        entries = self.entries.get(split, [])
        if not entries:
            return ChunkCounters()
        last = entries[-1]
        chunks = sum(len(entry.chunks) for entry in entries)
        return ChunkCounters(chunks, last.tokens_end, last.documents_end, last.next_position, last.next_offset)

    def close(self) -> None:
        """Releases the folder to others."""
        self._store.unlock()


def _differences(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [
        f"{where}: holds an unfinished preparation with {key} = {_short(old.get(key))}, this one has "
        f"{_short(new.get(key))}; run it with the old settings, or choose another folder"
        for key in changed
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"

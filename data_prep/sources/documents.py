"""Documents, and the tasks and sources that give them.

A source lists `Task`s: small, picklable pieces of work, each of which yields a run of the split's documents
wherever it is executed. The tasks of a split, and so its documents and their order, depend on the text alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from data_prep.packing import START, Position

TASK_BYTES = 1 << 20  # of text per task: large enough to hide its overhead, small enough to keep workers even


class Document(NamedTuple):
    """One document; `id` names it to people: a title, a file, or the row it came from. `changed` counts
    the characters that a stated policy replaced while reading, by reason."""

    id: str
    text: str
    changed: Mapping[str, int] = {}


@dataclass
class ReadCounts:
    """Counts of what was read: rows seen, documents dropped and characters changed, by reason."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def change(self, reason: str, count: int) -> None:
        self.changed[reason] = self.changed.get(reason, 0) + count


class Task(Protocol):
    """A run of documents, to be read anywhere."""

    @property
    def position(self) -> Position: ...

    @property
    def name(self) -> str:
        """The place of its text, for people."""
        ...

    @property
    def source_bytes(self) -> int:
        """About how much of the source it covers, for progress."""
        ...

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        """Yields the documents and adds what reading met to `counts`."""
        ...


class TextSource(Protocol):
    """A place that text comes from, by split."""

    name: str

    @property
    def notes(self) -> list[str]:
        """Lines to show before anything is read."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the text is read with, as JSON values; no path."""
        ...

    @property
    def splits(self) -> list[str]: ...

    def fingerprint(self) -> str | None:
        """A name of this exact text, such as a commit of the hub; None if what is there may change."""
        ...

    def changed(self, split: str) -> list[str]:
        """Names of the files that are not what they were when this source was made."""
        ...

    def total_bytes(self, split: str) -> int | None:
        """About how many bytes the tasks of a split cover; None if nobody knows."""
        ...

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        """The split's tasks from `start` on, in order."""
        ...


def read_documents(source: TextSource, split: str) -> Iterator[Document]:
    """All documents of a split, in order, in this process."""
    for task in source.tasks(split):
        yield from task.documents(ReadCounts())


@dataclass(frozen=True)
class Selection:
    """A rule that says which documents of unsplit text belong to a split, decided by the hash of the text alone.

    So a document lands in the same split wherever it stands, and exact duplicates never end up on both
    sides of the line between training and held-out text.
    """

    split: str
    valid_share: float = 0.0
    test_share: float = 0.0

    def has(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.valid_share:
            return self.split == "valid"
        if place < self.valid_share + self.test_share:
            return self.split == "test"
        return self.split == "train"


def select(rows: Iterable[Document | None], selection: Selection, counts: ReadCounts) -> Iterator[Document]:
    """The documents of a split; counts them, and rows without text (None) in train or in a split of its own."""
    whole = not selection.valid_share and not selection.test_share
    for row in rows:
        if row is None:
            if whole or selection.split == "train":
                counts.rows += 1
                counts.drop("null_text")
        elif whole or selection.has(row.text):
            counts.rows += 1
            if row.changed:
                for reason, count in row.changed.items():
                    counts.change(reason, count)
            yield row


@dataclass(frozen=True)
class BatchTask:
    """Documents that had to be read in order, in one place."""

    position: Position
    source_bytes: int
    batch: list[Document]
    counts: ReadCounts
    name: str = ""

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        counts.rows += self.counts.rows
        for reason, number in self.counts.dropped.items():
            counts.drop(reason, number)
        for reason, number in self.counts.changed.items():
            counts.change(reason, number)
        yield from self.batch


def batch_tasks(
    documents: Iterable[Document],
    counts: ReadCounts,
    unit: int,
    first_part: int = 0,
    name: str = "",
    task_bytes: int = TASK_BYTES,
) -> Iterator[BatchTask]:
    """Groups a unit's documents into tasks of about `task_bytes`; skips those before `first_part`.

    `counts` is the object that the generator `documents` counts into; every task takes its share along.
    """
    batch: list[Document] = []
    part = size = 0

    def close() -> BatchTask:
        share = ReadCounts(counts.rows, dict(counts.dropped), dict(counts.changed))
        counts.rows, counts.dropped, counts.changed = 0, {}, {}
        return BatchTask(Position(unit, part), size, batch, share, name)

    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= task_bytes:
            task = close()
            if part >= first_part:
                yield task
            batch, part, size = [], part + 1, 0
    if (batch or counts.rows) and part >= first_part:
        yield close()


def share_problems(valid_share: float, test_share: float) -> list[str]:
    """One line each for shares that leave nothing to train on."""
    problems = [
        f"{name} is {share}; it must be 0 or more, and less than 1"
        for name, share in (("valid_share", valid_share), ("test_share", test_share))
        if not 0 <= share < 1
    ]
    if not problems and valid_share + test_share >= 1:
        problems.append(
            f"valid_share {valid_share} and test_share {test_share} leave nothing for train; together they must be "
            "less than 1"
        )
    return problems

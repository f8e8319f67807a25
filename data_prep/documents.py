"""Sources: where documents come from.

A source lists `Task`s: small, picklable pieces of work, each of which yields a run of the split's documents
wherever it is executed. The tasks of a split, and so its documents and their order, depend on the text alone.
"""

from __future__ import annotations

import bz2
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import UserError
from data_prep.packing import START, Position

TASK_BYTES = 1 << 20  # text a task: large enough to hide its overhead, small enough to keep workers even


@dataclass(frozen=True)
class Document:
    """One document; `id` names it to people: a title, a file, or the row it came from. `changed` counts
    the characters that a stated policy replaced while reading, by reason."""

    id: str
    text: str
    changed: dict[str, int] = field(default_factory=dict)


@dataclass
class ReadCounts:
    """What reading met: rows seen, documents dropped and characters changed, by reason."""

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
        """Where its text stands, for people."""
        ...

    @property
    def source_bytes(self) -> int:
        """About how much of the source it covers, for progress."""
        ...

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        """Yields the documents and adds what reading met to `counts`."""
        ...


class Source(Protocol):
    """Text by split."""

    name: str

    @property
    def notes(self) -> list[str]:
        """Lines to show before anything is read."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """How the text is read, as JSON values; no path."""
        ...

    @property
    def splits(self) -> list[str]: ...

    def fingerprint(self) -> str | None:
        """What names this exact text, such as a commit of the hub; None if what is there may change."""
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


def read_documents(source: Source, split: str) -> Iterator[Document]:
    """All documents of a split, in order, in this process."""
    for task in source.tasks(split):
        yield from task.documents(ReadCounts())


@dataclass(frozen=True)
class Selection:
    """Which documents of unsplit text belong to a split: decided by the hash of the text alone.

    So a document lands in the same split wherever it stands, and exact duplicates never end up on both
    sides of the line between training and held-out text.
    """

    split: str
    valid_share: float = 0.0
    test_share: float = 0.0

    def has(self, text: str) -> bool:
        if not self.valid_share and not self.test_share:
            return True
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
        elif selection.has(row.text):
            counts.rows += 1
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


class SampleSource:
    """The 106 real Wikipedia articles that the pinned gensim package ships as test data.

    Every 18th article from the 6th on is validation text, every 18th from the 15th on test text: 94, 6
    and 6 articles.
    """

    name = "sample"
    notes: list[str] = []  # noqa: RUF012
    FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
    PERIOD, VALID, TEST = 18, 5, 14

    def __init__(self) -> None:
        package = find_spec("gensim")  # found, not imported: that takes seconds
        if package is None or package.origin is None:
            raise UserError("the sample text is not installed; `pip install gensim==4.4.0` brings it")
        self._path = Path(package.origin).parent / "test" / "test_data" / self.FILE

    @property
    def settings(self) -> dict[str, Any]:
        return {"articles": "gensim 4.4.0 test data", "sha256": self.SHA256}

    @property
    def splits(self) -> list[str]:
        return ["train", "valid", "test"]

    def fingerprint(self) -> str:
        if not self._path.is_file():
            raise UserError(f"{self._path}: missing; install the sample text with `pip install gensim==4.4.0`")
        sha256 = hashlib.sha256(self._path.read_bytes()).hexdigest()
        if sha256 != self.SHA256:
            raise UserError(
                f"{self._path}: sha256 {sha256[:16]}…, expected {self.SHA256[:16]}…; "
                "install the sample text with `pip install gensim==4.4.0`"
            )
        return sha256

    def changed(self, split: str) -> list[str]:
        return []

    def total_bytes(self, split: str) -> int | None:
        return sum(task.source_bytes for task in self.tasks(split))

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        for number, (title, markup) in enumerate(self._articles):
            position = Position(0, number)
            if self._split_of(number) == split and position >= start:
                yield SampleTask(position, len(markup), title, markup)

    def _split_of(self, number: int) -> str:
        return {self.VALID: "valid", self.TEST: "test"}.get(number % self.PERIOD, "train")

    @cached_property
    def _articles(self) -> list[tuple[str, str]]:
        from gensim.corpora import wikicorpus

        with bz2.open(self._path) as file:
            pages = wikicorpus.extract_pages(file, filter_namespaces=("0",))
            return [(title, text) for title, text, _ in pages if text and not text.upper().startswith("#RED")]


@dataclass(frozen=True)
class SampleTask:
    """One article's wiki markup, made plain text where the task runs."""

    position: Position
    source_bytes: int
    title: str
    markup: str

    @property
    def name(self) -> str:
        return self.title

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        from gensim.corpora import wikicorpus

        counts.rows += 1
        text = wikicorpus.filter_wiki(self.markup)
        text = re.sub(r"'{2,}", "", text)  # marks of bold and italic type
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        yield Document(self.title, f"{self.title}\n\n{text}\n")


HEADING = re.compile(r" = ([^=].*[^=]|[^=]) = \n")


def join_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(title, text) of each article of a wikitext file; the texts joined are the file.

    An article begins at a line ` = Title = ` between two blank ones: body text has such lines too, but
    not between blank lines. What stands before the first heading goes with the first article.
    """
    title = ""
    article: list[str] = []
    before = " \n"
    line: str | None = None
    headed = False
    for after in chain(lines, [None]):
        if line is not None:
            heading = HEADING.fullmatch(line)
            if heading and not before.strip() and not (after or "").strip():
                if headed:
                    yield title, "".join(article)
                    article = []
                title, headed = heading[1], True
            article.append(line)
            before = line
        line = after
    if article:
        yield title, "".join(article)

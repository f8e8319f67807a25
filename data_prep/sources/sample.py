"""The `sample` source: 106 Wikipedia articles that come with the extra `sample`."""

from __future__ import annotations

import bz2
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.packing import START, Position
from data_prep.sources.choice import SourceOptions
from data_prep.sources.documents import Document, ReadCounts, Task

INSTALL = "`pip install 'globallocal[sample]'` (or `pip install gensim==4.4.0`) brings it"


class SampleArticles:
    """The 106 real Wikipedia articles that the pinned gensim package ships as test data.

    Every 18th article from the 6th on is validation text, every 18th from the 15th on test text: 94, 6
    and 6 articles.
    """

    name = "sample"
    takes: ClassVar = frozenset[str]()
    notes: ClassVar[list[str]] = []
    FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
    PERIOD, VALID, TEST = 18, 5, 14

    @classmethod
    def from_options(cls, options: SourceOptions) -> SampleArticles:
        return cls()

    def __init__(self) -> None:
        package = find_spec("gensim")  # found, not imported: that takes seconds
        if package is None or package.origin is None:
            raise UserError(f"--source sample: its text is not installed; {INSTALL}")
        self._path = Path(package.origin).parent / "test" / "test_data" / self.FILE

    @property
    def settings(self) -> dict[str, Any]:
        return {"articles": "gensim 4.4.0 test data", "sha256": self.SHA256}

    @property
    def splits(self) -> list[str]:
        return ["train", "valid", "test"]

    def fingerprint(self) -> str:
        if not self._path.is_file():
            raise UserError(f"{self._path}: missing; {INSTALL}")
        sha256 = hashlib.sha256(self._path.read_bytes()).hexdigest()
        if sha256 != self.SHA256:
            raise UserError(f"{self._path}: sha256 {sha256[:16]}…, expected {self.SHA256[:16]}…; {INSTALL}")
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

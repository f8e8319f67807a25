"""Datasets of the Hugging Face hub, streamed; and wikitext-103, restored to the file it was made from."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

from data_prep.documents import Document, ReadCounts, Selection, Task, batch_tasks, select
from data_prep.errors import UserError
from data_prep.files import row_document
from data_prep.packing import START, Position

# Waits between attempts; a row that arrives starts them anew. Within each attempt the libraries below
# retry single requests, for some two minutes.
RETRY_SECONDS = (5, 15, 45)
SPLIT_NAMES = {"validation": "valid", "dev": "valid"}
SPLIT_ORDER = ["train", "valid", "test"]


@dataclass(frozen=True)
class HubSettings:
    """Which dataset of the hub.

    Attributes:
        dataset: its id, such as "Salesforce/wikitext".
        config: one of its configurations, if it has several.
        revision: commit, tag or branch; resolved to a commit, which the manifest records.
        text_column, id_column: see `FilesSettings`.
        valid_share, test_share: part of train that is held out, where the dataset has no such split.
    """

    dataset: str
    config: str | None = None
    revision: str | None = None
    text_column: str = "text"
    id_column: str | None = None
    valid_share: float = 0.0
    test_share: float = 0.0


class HubSource:
    """A dataset of the hub, streamed row by row; a row is a document."""

    name = "hub"

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings

    @cached_property
    def _revision(self) -> str:
        wanted = self._settings.revision
        if wanted and re.fullmatch(r"[0-9a-f]{40}", wanted):
            return wanted
        from huggingface_hub import HfApi

        info = _retried(lambda: HfApi().dataset_info(self._settings.dataset, revision=wanted), self._where)
        return info.sha

    @property
    def _where(self) -> str:
        config = f" ({self._settings.config})" if self._settings.config else ""
        return f"{self._settings.dataset}{config}"

    @cached_property
    def _hub_splits(self) -> dict[str, str]:
        """The hub's name of each split."""
        import datasets

        names = _retried(
            lambda: datasets.get_dataset_split_names(
                self._settings.dataset, self._settings.config, revision=self._revision
            ),
            self._where,
        )
        splits = {SPLIT_NAMES.get(name, name): name for name in names}
        known = [split for split in SPLIT_ORDER if split in splits]
        return {split: splits[split] for split in [*known, *(split for split in splits if split not in known)]}

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self._settings), "revision": self._revision}

    @property
    def splits(self) -> list[str]:
        shares = {"valid": self._settings.valid_share, "test": self._settings.test_share}
        taken = [split for split, share in shares.items() if share]
        if both := [split for split in taken if split in self._hub_splits]:
            raise UserError(f"{self._where}: has a split '{both[0]}' of its own; leave --{both[0]}-share out")
        return [*self._hub_splits, *taken]

    def fingerprint(self) -> str:
        return self._revision

    def total_bytes(self, split: str) -> int | None:
        return None

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        counts = ReadCounts()
        shares = (self._settings.valid_share, self._settings.test_share)
        shared = split == "train" or split not in self._hub_splits
        selection = Selection(split, *shares) if shared else Selection(split)
        documents = select(self._rows(split), selection, counts)
        return batch_tasks(documents, counts, 0, start.part)

    def _rows(self, split: str) -> Iterator[Document | None]:
        hub_split = self._hub_splits.get(split, self._hub_splits.get("train", "train"))
        for number, row in enumerate(self._stream(hub_split)):
            id = f"{hub_split}:{number}"
            where = f"{self._where}, {hub_split} row {number:,}"
            yield row_document(row, self._settings.text_column, self._settings.id_column, id, where, {})

    def _stream(self, hub_split: str) -> Iterator[dict[str, Any]]:
        """Rows in order; after a lost connection, from the row after the last one that arrived."""
        import datasets

        done = failures = 0
        while True:
            try:
                stream = datasets.load_dataset(
                    self._settings.dataset,
                    self._settings.config,
                    split=hub_split,
                    revision=self._revision,
                    streaming=True,
                )
                for row in stream.skip(done) if done else stream:
                    done, failures = done + 1, 0
                    yield row
                return
            except UserError:
                raise
            except Exception as error:
                failures += 1
                _wait_or_refuse(f"{self._where}, {hub_split} after row {done:,}", error, failures)


def _retried(call: Any, where: str) -> Any:
    failures = 0
    while True:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            failures += 1
            _wait_or_refuse(where, error, failures)


def _wait_or_refuse(where: str, error: Exception, failures: int) -> None:
    """Sleeps before the next attempt; raises UserError if it would be in vain or there were enough."""
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "NotFound" in kind or "Gated" in kind or status in (401, 403, 404):
        raise UserError(
            f"{where}: not on the hub, or not open to you ({text}); check the id, the revision and your token"
        ) from error
    if isinstance(error, ValueError):
        raise UserError(f"{where}: the hub has no such configuration or split ({text})") from error
    if failures > len(RETRY_SECONDS):
        raise UserError(
            f"{where}: the hub could not be read in {failures} attempts over {sum(RETRY_SECONDS)} seconds "
            f"({kind}: {text}); check the network and HF_ENDPOINT, then run the same command again"
        ) from error
    time.sleep(RETRY_SECONDS[failures - 1])


class WikitextSource(HubSource):
    """wikitext-103 (raw), whose documents joined are the published files, byte for byte.

    On the hub a row is a line, and a blank line (" \n" in the file) an empty row. Rows are joined into
    articles. Counts are checked against those in the hub's own record of this revision.
    """

    name = "wikitext-103"
    REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
    ROWS: ClassVar = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
    ROW_BYTES: ClassVar = {"train": 539_295_549, "valid": 1_144_248, "test": 1_287_656}

    def __init__(self) -> None:
        super().__init__(HubSettings("Salesforce/wikitext", "wikitext-103-raw-v1", self.REVISION))

    @cached_property
    def _hub_splits(self) -> dict[str, str]:
        return {"train": "train", "valid": "validation", "test": "test"}

    def total_bytes(self, split: str) -> int | None:
        return self.ROW_BYTES[split]

    def _rows(self, split: str) -> Iterator[Document]:
        rows = row_bytes = 0

        def lines() -> Iterator[str]:
            nonlocal rows, row_bytes
            for row in self._stream(self._hub_splits[split]):
                text = row["text"]
                rows, row_bytes = rows + 1, row_bytes + len(text.encode())
                yield text or " \n"

        for number, (title, text) in enumerate(join_articles(lines())):
            yield Document(f"{number}:{title}", text)
        counted = (("rows", rows, self.ROWS), ("bytes", row_bytes, self.ROW_BYTES))
        if problems := [
            f"{self._where}: split '{split}' has {seen:,} {unit}, published are {published[split]:,}; "
            "the hub's copy is another text: use --source hub for it"
            for unit, seen, published in counted
            if seen != published[split]
        ]:
            raise UserError(problems)


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

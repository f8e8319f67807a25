"""Datasets of the Hugging Face hub, streamed; and wikitext-103, restored to the file it was made from."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, TypeVar

from data_prep.errors import UserError
from data_prep.packing import START, Position
from data_prep.retries import retried
from data_prep.sources.choice import SourceOptions
from data_prep.sources.documents import Document, ReadCounts, Selection, Task, batch_tasks, select, share_problems
from data_prep.sources.text import join_articles, row_document

# Waits between attempts; a row that arrives starts them anew. Within each attempt the libraries below
# retry single requests, for some two minutes.
RETRY_SECONDS = (5, 15, 45)
TIMEOUT_SECONDS = 30.0  # to connect, and between two bytes of an answer
WORDS_REPLACED = re.compile(r"wikitext-(2|103)-v1")  # WikiText's tokens: rare words are `<unk>`

_log = logging.getLogger(__name__)
T = TypeVar("T")
SPLIT_NAMES = {"validation": "valid", "dev": "valid"}
SPLIT_ORDER = ["train", "valid", "test"]


@dataclass(frozen=True)
class HubSettings:
    """The choice of a dataset of the hub.

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
    takes: ClassVar = frozenset(
        {"dataset", "config", "revision", "text_column", "id_column", "valid_share", "test_share"}
    )

    @classmethod
    def from_options(cls, options: SourceOptions) -> HubSource:
        if not options.dataset:
            raise UserError("--source hub needs --dataset ID, such as --dataset Salesforce/wikitext")
        return cls(
            HubSettings(
                options.dataset,
                options.config,
                options.revision,
                options.text_column,
                options.id_column,
                options.valid_share,
                options.test_share,
            )
        )

    def __init__(self, settings: HubSettings) -> None:
        if problems := share_problems(settings.valid_share, settings.test_share):
            raise UserError(problems)
        bound_waits()
        self._settings = settings

    @property
    def notes(self) -> list[str]:
        if self._settings.config and WORDS_REPLACED.fullmatch(self._settings.config):
            raw = self._settings.config.replace("-v1", "-raw-v1")
            return [f"{self._where}: rare words are replaced by <unk> in it; --config {raw} is the whole text"]
        return []

    @cached_property
    def _found(self) -> tuple[str, str]:
        """The id that the hub answers with, which an old one leads to, and the commit."""
        from huggingface_hub import HfApi

        wanted = self._settings.revision
        info = _retried(lambda: HfApi().dataset_info(self._settings.dataset, revision=wanted), self._where)
        return info.id or self._settings.dataset, info.sha or ""

    @property
    def _dataset(self) -> str:
        return self._found[0]

    @property
    def _revision(self) -> str:
        return self._found[1]

    @property
    def _where(self) -> str:
        config = f" ({self._settings.config})" if self._settings.config else ""
        return f"{self._settings.dataset}{config}"

    @cached_property
    def _hub_splits(self) -> dict[str, str]:
        """The hub's name of each split."""
        import datasets

        names = _retried(
            lambda: datasets.get_dataset_split_names(self._dataset, self._settings.config, revision=self._revision),
            self._where,
        )
        splits = {SPLIT_NAMES.get(name, name): name for name in names}
        known = [split for split in SPLIT_ORDER if split in splits]
        return {split: splits[split] for split in [*known, *(split for split in splits if split not in known)]}

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self._settings), "dataset": self._dataset, "revision": self._revision}

    @property
    def splits(self) -> list[str]:
        shares = {"valid": self._settings.valid_share, "test": self._settings.test_share}
        taken = [split for split, share in shares.items() if share]
        if both := [split for split in taken if split in self._hub_splits]:
            raise UserError(f"{self._where}: has a split '{both[0]}' of its own; leave --{both[0]}-share out")
        return [*self._hub_splits, *taken]

    def fingerprint(self) -> str:
        return self._revision

    def changed(self, split: str) -> list[str]:
        return []  # a commit is what it is

    def total_bytes(self, split: str) -> int | None:
        return None

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        counts = ReadCounts()
        shares = (self._settings.valid_share, self._settings.test_share)
        shared = split == "train" or split not in self._hub_splits
        selection = Selection(split, *shares) if shared else Selection(split)
        documents = select(self._rows(split), selection, counts)
        return batch_tasks(documents, counts, 0, start.part, f"{self._where}, {split}")

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
                    self._dataset,
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


@cache
def bound_waits() -> None:
    """Sets time limits for the hub's client, which would wait for an answer for ever."""
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def bound(request: Any) -> None:
        waits = request.extensions.setdefault("timeout", {})
        waits.update({kind: waits.get(kind) or TIMEOUT_SECONDS for kind in ("connect", "read", "write", "pool")})

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks["request"].append(bound)
        return made

    huggingface_hub.set_client_factory(client)


def _retried(call: Callable[[], T], where: str) -> T:
    return retried(call, lambda error, failures: _wait_or_refuse(where, error, failures))


def _garbled() -> tuple[type[Exception], ...]:
    """The exceptions that libraries raise for a wrong answer, such as a proxy's page; a later answer may be right."""
    import pyarrow

    return (OSError, json.JSONDecodeError, UnicodeError, pyarrow.ArrowException)


def _wait_or_refuse(where: str, error: Exception, failures: int) -> None:
    """Sleeps before the next attempt; raises UserError if it would be in vain or there were enough."""
    if type(error).__name__ == "SplitsNotFoundError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # whatever went wrong
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "NotFound" in kind or "Gated" in kind or status in (401, 403, 404):
        raise UserError(
            f"{where}: not on the hub, or not open to you ({text}); check the id, the revision and your token"
        ) from error
    if "Offline" in kind or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{where}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it") from error
    if isinstance(error, ValueError) and not isinstance(error, _garbled()):
        raise UserError(
            f"{where}: the hub has no such configuration or split ({text}); check --config and --revision"
        ) from error
    if failures > len(RETRY_SECONDS):
        raise UserError(
            f"{where}: the hub could not be read in {failures} attempts over {sum(RETRY_SECONDS)} seconds "
            f"({kind}: {text}); check the network and HF_ENDPOINT, then run the same command again"
        ) from error
    seconds = RETRY_SECONDS[failures - 1]
    _log.warning("%s: %s %s; try %d of %d in %d s", where, kind, text, failures + 1, len(RETRY_SECONDS) + 1, seconds)
    time.sleep(seconds)


class WikitextSource(HubSource):
    """wikitext-103 (raw), whose documents joined are the published files, byte for byte.

    On the hub a row is a line, and a blank line (" \n" in the file) an empty row. Rows are joined into
    articles. Counts are checked against those in the hub's own record of this revision.
    """

    name = "wikitext-103"
    takes: ClassVar = frozenset[str]()
    REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
    ROWS: ClassVar = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
    ROW_BYTES: ClassVar = {"train": 539_295_549, "valid": 1_144_248, "test": 1_287_656}

    @classmethod
    def from_options(cls, options: SourceOptions) -> WikitextSource:
        return cls()

    def __init__(self) -> None:
        super().__init__(HubSettings("Salesforce/wikitext", "wikitext-103-raw-v1", self.REVISION))

    @cached_property
    def _found(self) -> tuple[str, str]:
        return self._settings.dataset, self.REVISION

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

"""The sources by name, and the options that say how a source reads: a new source is one class and one line here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.sources.documents import TextSource

Separator = Literal["file", "blank-lines", "wikitext-headings"]
"""What parts the documents of a txt file."""


class Registered(NamedTuple):
    """A source that can be named: its class, imported only when it is chosen, and what it reads."""

    place: str
    help: str


SOURCES = {
    "sample": Registered(
        "data_prep.sources.sample:SampleArticles",
        "106 Wikipedia articles that come with the extra 'sample'",
    ),
    "files": Registered("data_prep.sources.files:FilesSource", "your own text (--path)"),
    "wikitext-103": Registered("data_prep.sources.hub:WikitextSource", "from the Hugging Face hub"),
    "hub": Registered("data_prep.sources.hub:HubSource", "any dataset there (--dataset)"),
}


@dataclass(frozen=True)
class SourceOptions:
    """The options that describe the text: the name of its source, and what that source takes.

    Attributes:
        source: a name in `SOURCES`.
        path: files, folders, patterns or URLs; `valid=PATTERN` and `test=PATTERN` name held-out splits.
        dataset: the id of a dataset of the hub.
        config: its configuration.
        revision: its commit, tag or branch.
        text_column: of rows, the column with the text.
        id_column: of rows, a column with ids.
        separator: what parts the documents of a txt file.
        valid_share: part of the training documents to hold out as 'valid'.
        test_share: the same for 'test'.
    """

    source: str = "sample"
    path: list[str] = field(default_factory=list)
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    text_column: str = "text"
    id_column: str | None = None
    separator: Separator = "file"
    valid_share: float = 0.0
    test_share: float = 0.0

    def given(self) -> list[str]:
        """The options that were given, besides the source's name: those that are not as they are by default."""
        default = SourceOptions()
        names = [item.name for item in fields(self) if item.name != "source"]
        return [name for name in names if getattr(self, name) != getattr(default, name)]


class Choosable(Protocol):
    """A class of sources, as `SOURCES` names it."""

    takes: frozenset[str]
    """The fields of `SourceOptions` that it reads."""

    def from_options(self, options: SourceOptions) -> TextSource:
        """A source of this class. Raises UserError, with all problems at once."""
        ...


def choose_source(options: SourceOptions) -> TextSource:
    """The source that the options name.

    Raises UserError for an unknown name, for options that do not go with the source, and for what the source refuses.
    """
    if options.source not in SOURCES:
        raise UserError(f"--source {options.source}: unknown; it is one of {', '.join(SOURCES)}")
    chosen = source_class(options.source)
    problems = []
    for name in options.given():
        if name not in chosen.takes:
            takers = [other for other in SOURCES if name in source_class(other).takes]
            problems.append(
                f"--{name.replace('_', '-')} goes with --source {' or '.join(takers)}, not with {options.source}"
            )
    try:
        source = chosen.from_options(options)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return source


def source_class(name: str) -> Choosable:
    """The class that is registered under a name."""
    found: Choosable = resolve_name(SOURCES[name].place)
    return found

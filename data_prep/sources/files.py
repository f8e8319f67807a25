"""The `files` source: anyone's text, as txt, jsonl or parquet, on a disk or behind any fsspec URL."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, ClassVar

import pyarrow
import pyarrow.parquet

from data_prep import remote_file
from data_prep.errors import UserError
from data_prep.packing import START, Position
from data_prep.sources.choice import Separator, SourceOptions
from data_prep.sources.documents import (
    TASK_BYTES,
    Document,
    ReadCounts,
    Selection,
    Task,
    batch_tasks,
    select,
    share_problems,
)
from data_prep.sources.find import FoundFile, find_files, large_documents, paths_by_split
from data_prep.sources.json_lines import READ_BYTES, json_documents
from data_prep.sources.text import beginning, columns_shown, decode_utf8, join_articles, row_document

MAX_TASK_FILES = 64


@dataclass(frozen=True)
class FilesSettings:
    """The choice of files, and the way to read them.

    Attributes:
        paths: patterns or URLs by split; those under "train" are shared out by the two shares below.
        text_column: of jsonl and parquet rows.
        id_column: a column with the documents' ids; by default a document's id is its file and row.
        separator: what parts the documents of a txt file: "file" (one each), "blank-lines", or
            "wikitext-headings" (the form of WikiText's published files).
        valid_share, test_share: part of the documents under "train" that are held out, chosen by the hash
            of their text.
    """

    paths: dict[str, list[str]]
    text_column: str = "text"
    id_column: str | None = None
    separator: Separator = "file"
    valid_share: float = 0.0
    test_share: float = 0.0


@contextmanager
def opened(file: FoundFile, ahead: int | None = None) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed; whatever goes wrong while reading them is a UserError.

    Args:
        ahead: see `remote_file.open_file`.
    """
    try:
        with remote_file.open_file(file.url, file.size, ahead) if file.remote else open(file.url, "rb") as raw:
            if file.compression:  # pyarrow, unlike others, tells a cut stream from a whole one
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), file.compression)
                yield io.BufferedReader(stream, READ_BYTES)
            else:
                yield raw
    except UserError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file.shown}: cannot be read ({reason}); check the path and your access to it, or restore the file"
        ) from error


class FilesSource:
    """Text files by split. Raises UserError, with all problems at once, if a pattern matches nothing."""

    name = "files"
    takes: ClassVar = frozenset({"path", "text_column", "id_column", "separator", "valid_share", "test_share"})

    @classmethod
    def from_options(cls, options: SourceOptions) -> FilesSource:
        return cls(
            FilesSettings(
                paths_by_split(options.path),
                options.text_column,
                options.id_column,
                options.separator,
                options.valid_share,
                options.test_share,
            )
        )

    def __init__(self, settings: FilesSettings) -> None:
        self._settings = settings
        self.paths = settings.paths
        problems = share_problems(settings.valid_share, settings.test_share)
        for split, share in (("valid", settings.valid_share), ("test", settings.test_share)):
            if share and split in settings.paths:
                problems.append(f"split '{split}' has files of its own and a share of train too; choose one")
        try:
            self._files, self.notes = find_files(settings.paths)
        except UserError as error:
            problems = [*error.problems, *problems]
        if problems:
            raise UserError(problems)
        if settings.separator == "file":
            self.notes += large_documents(self._files)

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self._settings).items() if name != "paths"}

    @property
    def splits(self) -> list[str]:
        held_out = {"valid": self._settings.valid_share, "test": self._settings.test_share}
        named = [split for split in ("train", "valid", "test") if split in self._settings.paths]
        return [*named, *(split for split, share in held_out.items() if share)]

    def fingerprint(self) -> None:
        """Files may change: what is in them is compared with what was read."""
        return

    def changed(self, split: str) -> list[str]:
        return [file.shown for file in self._split_files(split) if file.changed()]

    def total_bytes(self, split: str) -> int | None:
        return sum(file.size for file in self._split_files(split))

    def _split_files(self, split: str) -> list[FoundFile]:
        return self._files.get(split, self._files.get("train", []))

    def _selection(self, split: str) -> Selection:
        if split in self._files and split != "train":
            return Selection(split)
        return Selection(split, self._settings.valid_share, self._settings.test_share)

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        files = self._split_files(split)
        selection = self._selection(split)
        for unit, group in enumerate(_group(files, self._settings.separator)):
            if unit < start.unit:
                continue
            first_part = start.part if unit == start.unit else 0
            yield from self._unit_tasks(unit, group, first_part, selection)

    def _unit_tasks(self, unit: int, group: list[FoundFile], first_part: int, selection: Selection) -> Iterator[Task]:
        file = group[0]
        if file.format == "txt" and self._settings.separator == "file":
            yield TextFilesTask(Position(unit, 0), sum(f.size for f in group), group, selection)
        elif file.format == "txt":
            parts = _blank_line_documents if self._settings.separator == "blank-lines" else _wikitext_documents
            counts = ReadCounts()
            yield from batch_tasks(select(parts(file), selection, counts), counts, unit, first_part, file.shown)
        elif file.format == "jsonl" and file.compression is None and not file.url.startswith("http"):
            for part, begin in enumerate(range(0, file.size, TASK_BYTES)):
                if part >= first_part:
                    end = min(begin + TASK_BYTES, file.size)
                    yield JsonLinesTask(Position(unit, part), end - begin, file, begin, end, self._settings, selection)
        elif file.format == "jsonl":
            counts = ReadCounts()
            with opened(file) as stream:
                rows = json_documents(stream, file, 0, None, self._settings)
                yield from batch_tasks(select(rows, selection, counts), counts, unit, first_part, file.shown)
        else:
            yield from self._parquet_tasks(unit, file, first_part, selection)

    def _parquet_tasks(self, unit: int, file: FoundFile, first_part: int, selection: Selection) -> Iterator[Task]:
        with _parquet(file) as parquet:
            metadata = parquet.metadata
        first_row = 0
        for part in range(metadata.num_row_groups):
            group = metadata.row_group(part)
            if part >= first_part:
                size = group.total_byte_size
                yield ParquetTask(Position(unit, part), size, file, part, first_row, self._settings, selection)
            first_row += group.num_rows


def _group(files: list[FoundFile], separator: str) -> Iterator[list[FoundFile]]:
    """Whole small txt files together, everything else alone."""
    group: list[FoundFile] = []
    for file in files:
        alone = file.format != "txt" or separator != "file"
        full = len(group) >= MAX_TASK_FILES or sum(f.size for f in group) >= TASK_BYTES
        if group and (alone or full):
            yield group
            group = []
        if alone:
            yield [file]
        else:
            group.append(file)
    if group:
        yield group


@dataclass(frozen=True)
class TextFilesTask:
    """Files that are one document each."""

    position: Position
    source_bytes: int
    files: list[FoundFile]
    selection: Selection

    @property
    def name(self) -> str:
        more = f" (or one of the {len(self.files) - 1} files after it)" if len(self.files) > 1 else ""
        return self.files[0].shown + more

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        yield from select(map(self._read, self.files), self.selection, counts)

    def _read(self, file: FoundFile) -> Document:
        with opened(file) as stream:
            content, mark = beginning(stream.read(), file.shown)
        text, changed = decode_utf8(content)
        return Document(file.name, text, {**mark, **changed})


def _lines(file: FoundFile) -> Iterator[tuple[bytes, dict[str, int]]]:
    """The lines of a text file, and what was changed in each."""
    with opened(file) as stream:
        beginning(stream.peek(4096), file.shown)  # type: ignore[attr-defined]
        for number, line in enumerate(stream):
            yield beginning(line, file.shown) if number == 0 else (line, {})


def _blank_line_documents(file: FoundFile) -> Iterator[Document]:
    """Runs of lines between blank ones; a document keeps its lines, without the newline after the last."""
    lines: list[bytes] = []
    first_line = 0
    mark: dict[str, int] = {}

    def close() -> Document:
        nonlocal mark
        text, changed = decode_utf8(b"".join(lines).removesuffix(b"\n"))
        document = Document(f"{file.name}:{first_line}", text, {**mark, **changed})
        mark = {}
        return document

    for number, (line, changed) in enumerate(_lines(file), 1):
        mark = {**mark, **changed}
        if line.strip():
            first_line = first_line if lines else number
            lines.append(line)
        elif lines:
            yield close()
            lines = []
    if lines:
        yield close()


def _wikitext_documents(file: FoundFile) -> Iterator[Document]:
    """The articles of a file in WikiText's form; joined they are the file."""
    mark: dict[str, int] = {}

    def lines() -> Iterator[str]:
        for line, changed in _lines(file):
            mark.update(changed)
            yield line.decode(errors="surrogateescape")

    for number, (title, article) in enumerate(join_articles(lines())):
        text, changed = decode_utf8(article.encode(errors="surrogateescape"))
        yield Document(f"{file.name}:{number}:{title}", text, {**mark, **changed})
        mark.clear()


@dataclass(frozen=True)
class JsonLinesTask:
    """The lines of a jsonl file that begin in [begin, end) bytes."""

    position: Position
    source_bytes: int
    file: FoundFile
    begin: int
    end: int
    settings: FilesSettings
    selection: Selection

    @property
    def name(self) -> str:
        return f"{self.file.shown} (bytes {self.begin:,} to {self.end:,})"

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        with opened(self.file, ahead=max(READ_BYTES, self.source_bytes)) as stream:
            start = self.begin
            if self.begin:
                # A line begins in this range if the newline before it does, one byte earlier. Looked for no
                # further: a line longer than many tasks would be read by each of them to its end.
                stream.seek(self.begin - 1)
                before = stream.readline(self.end - self.begin)
                if not before.endswith(b"\n"):
                    return
                start = self.begin - 1 + len(before)
            rows = json_documents(stream, self.file, start, self.end, self.settings)
            yield from select(rows, self.selection, counts)


@contextmanager
def _parquet(file: FoundFile) -> Iterator[pyarrow.parquet.ParquetFile]:
    with opened(file, ahead=READ_BYTES) as stream:
        try:
            # Without threads: one that still read when the interpreter ended would abort the process.
            parquet = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.shown}: not a parquet file ({error}); restore it") from None
        yield parquet


@dataclass(frozen=True)
class ParquetTask:
    """One row group of a parquet file."""

    position: Position
    source_bytes: int
    file: FoundFile
    row_group: int
    first_row: int
    settings: FilesSettings
    selection: Selection

    @property
    def name(self) -> str:
        return f"{self.file.shown} (row group {self.row_group:,})"

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        yield from select(self._rows(), self.selection, counts)

    def _rows(self) -> Iterator[Document | None]:
        text_column, id_column = self.settings.text_column, self.settings.id_column
        columns = [column for column in (text_column, id_column) if column is not None]
        with _parquet(self.file) as parquet:
            schema = parquet.schema_arrow
            if missing := [column for column in columns if column not in schema.names]:
                raise UserError(f"{self.file.shown}: no column '{missing[0]}'; it has {columns_shown(schema.names)}")
            if not _holds_text(schema.field(text_column).type):
                raise UserError(
                    f"{self.file.shown}: column '{text_column}' holds {schema.field(text_column).type}, not text; "
                    "name another with --text-column"
                )
            table = parquet.read_row_group(self.row_group, columns=columns, use_threads=False)
        texts = table.column(text_column)
        if not pyarrow.types.is_null(texts.type):
            # As bytes, so that invalid UTF-8 is handled here as everywhere.
            place = table.column_names.index(text_column)
            table = table.set_column(place, text_column, texts.cast(pyarrow.large_binary()))
        for number in range(table.num_rows):
            row = {column: table.column(column)[number].as_py() for column in columns}
            where = f"{self.file.shown}: row {self.first_row + number:,}"
            id = f"{self.file.name}:{self.first_row + number}"
            yield row_document(row, text_column, id_column, id, where, {})


def _holds_text(type: pyarrow.DataType) -> bool:
    kinds = pyarrow.types
    if kinds.is_dictionary(type):
        return _holds_text(type.value_type)
    checks = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary, kinds.is_large_binary)
    return any(check(type) for check in (*checks, kinds.is_binary_view, kinds.is_null))

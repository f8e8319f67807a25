"""The `files` source: anyone's text, as txt, jsonl or parquet, on a disk or behind any fsspec URL."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec
import pyarrow
import pyarrow.parquet

from data_prep.documents import TASK_BYTES, Document, ReadCounts, Selection, Task, batch_tasks, select
from data_prep.errors import UserError
from data_prep.manifest import canonical_json
from data_prep.packing import START, Position

Format = Literal["txt", "jsonl", "parquet"]
FORMATS: dict[str, Format] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".raw": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_TASK_FILES = 64
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class FilesSettings:
    """Which files, and how to read them.

    Attributes:
        paths: patterns or URLs by split; those under "train" are shared out by the two shares below.
        text_column: of jsonl and parquet rows.
        id_column: a column with the documents' ids; by default a document's id is its file and row.
        separator: what parts the documents of a txt file: "file" (one each) or "blank-lines".
        valid_share, test_share: part of the documents under "train" that are held out, chosen by the hash
            of their text.
    """

    paths: dict[str, list[str]]
    text_column: str = "text"
    id_column: str | None = None
    separator: Literal["file", "blank-lines"] = "file"
    valid_share: float = 0.0
    test_share: float = 0.0


@dataclass(frozen=True)
class SourceFile:
    """One file: where it is, its name among the others, its size, how to read it."""

    url: str
    name: str
    size: int
    format: Format
    compression: str | None

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's bytes, decompressed; whatever goes wrong while reading them is a UserError."""
        try:
            with fsspec.open(self.url, "rb") as raw:
                if self.compression:  # pyarrow, unlike others, tells a cut stream from a whole one
                    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), self.compression)
                    yield io.BufferedReader(stream, READ_BYTES)
                else:
                    yield raw
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.url}: cannot be read ({type(error).__name__}: {error}); "
                "check the path and your access to it, or restore the file"
            ) from error


class FilesSource:
    """Text files by split. Raises UserError, with all problems at once, if a pattern matches nothing."""

    name = "files"

    def __init__(self, settings: FilesSettings) -> None:
        self._settings = settings
        self._files = _find_files(settings)
        problems = [
            f"{name} is {share}; it must be between 0 and 1"
            for name, share in (("valid_share", settings.valid_share), ("test_share", settings.test_share))
            if not 0 <= share < 1
        ]
        for split, share in (("valid", settings.valid_share), ("test", settings.test_share)):
            if share and split in settings.paths:
                problems.append(f"split '{split}' has files of its own and a share of train too; choose one")
        if problems:
            raise UserError(problems)

    @property
    def settings(self) -> dict[str, Any]:
        chosen = self._settings
        return {
            "paths": chosen.paths,
            "text_column": chosen.text_column,
            "id_column": chosen.id_column,
            "separator": chosen.separator,
            "valid_share": chosen.valid_share,
            "test_share": chosen.test_share,
        }

    @property
    def splits(self) -> list[str]:
        held_out = {"valid": self._settings.valid_share, "test": self._settings.test_share}
        return [*self._settings.paths, *(split for split, share in held_out.items() if share)]

    def fingerprint(self) -> str:
        listing = [[split, file.name, file.size] for split, files in self._files.items() for file in files]
        return hashlib.sha256(canonical_json(listing)).hexdigest()

    def total_bytes(self, split: str) -> int | None:
        return sum(file.size for file in self._split_files(split))

    def _split_files(self, split: str) -> list[SourceFile]:
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

    def _unit_tasks(self, unit: int, group: list[SourceFile], first_part: int, selection: Selection) -> Iterator[Task]:
        file = group[0]
        if file.format == "txt" and self._settings.separator == "file":
            position = Position(unit, 0)
            yield TextFilesTask(position, sum(f.size for f in group), group, selection)
        elif file.format == "txt":
            counts = ReadCounts()
            documents = select(_blank_line_documents(file), selection, counts)
            yield from batch_tasks(documents, counts, unit, first_part)
        elif file.format == "jsonl" and file.compression is None and not file.url.startswith("http"):
            for part, begin in enumerate(range(0, file.size, TASK_BYTES)):
                if part >= first_part:
                    end = min(begin + TASK_BYTES, file.size)
                    yield JsonLinesTask(Position(unit, part), end - begin, file, begin, end, self._settings, selection)
        elif file.format == "jsonl":
            counts = ReadCounts()
            with file.open() as stream:
                rows = _json_documents(stream, file, 0, None, self._settings)
                yield from batch_tasks(select(rows, selection, counts), counts, unit, first_part)
        else:
            yield from self._parquet_tasks(unit, file, first_part, selection)

    def _parquet_tasks(self, unit: int, file: SourceFile, first_part: int, selection: Selection) -> Iterator[Task]:
        with _parquet(file) as parquet:
            metadata = parquet.metadata
        first_row = 0
        for part in range(metadata.num_row_groups):
            group = metadata.row_group(part)
            if part >= first_part:
                size = group.total_byte_size
                yield ParquetTask(Position(unit, part), size, file, part, first_row, self._settings, selection)
            first_row += group.num_rows


def _find_files(settings: FilesSettings) -> dict[str, list[SourceFile]]:
    problems: list[str] = []
    files: dict[str, list[SourceFile]] = {}
    if not settings.paths:
        problems.append("no files named; give some with --path PATTERN")
    for split, patterns in settings.paths.items():
        found: dict[str, SourceFile] = {}
        for pattern in patterns:
            matches = _expand(pattern, problems)
            found.update((file.url, file) for file in matches)
        files[split] = sorted(found.values(), key=lambda file: file.url)
    if problems:
        raise UserError(problems)
    return files


def _expand(pattern: str, problems: list[str]) -> list[SourceFile]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if any(mark in path for mark in "*?["):
            matches = sorted(p for p in filesystem.glob(path) if not filesystem.isdir(p))
        elif filesystem.isdir(path) and not pattern.startswith("http"):
            matches = sorted(p for p in filesystem.find(path) if _format_of(p)[0])
        else:
            matches = [path]
        if not matches:
            problems.append(f"{pattern}: matches no file; check the pattern (quote it against the shell)")
        found = []
        base = path.split("*")[0].rsplit("/", 1)[0]
        for match in matches:
            format, compression = _format_of(match)
            if format is None:
                known = ", ".join(FORMATS)
                problems.append(f"{match}: unknown kind of file; known endings: {known} (and .gz, .zst after them)")
                continue
            size = filesystem.size(match)
            name = match[len(base) :].lstrip("/") if match.startswith(base) else match
            found.append(SourceFile(filesystem.unstrip_protocol(match), name, size or 0, format, compression))
        return found
    except FileNotFoundError:
        problems.append(f"{pattern}: no such file")
    except (OSError, ValueError, ImportError) as error:
        problems.append(f"{pattern}: cannot be read ({error}); check the path and your access to it")
    return []


def _format_of(path: str) -> tuple[Format | None, str | None]:
    compression = None
    for ending, name in COMPRESSIONS.items():
        if path.endswith(ending):
            path, compression = path.removesuffix(ending), name
    dot = path.rfind(".")
    return (FORMATS.get(path[dot:].lower()) if dot >= 0 else None), compression


def _group(files: list[SourceFile], separator: str) -> Iterator[list[SourceFile]]:
    """Whole small txt files together, everything else alone."""
    group: list[SourceFile] = []
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


def decode_utf8(content: bytes) -> tuple[str, dict[str, int]]:
    """Text of bytes. What is not UTF-8 becomes U+FFFD, and is counted as `invalid_utf8`."""
    try:
        return content.decode(), {}
    except UnicodeDecodeError:
        text = content.decode("utf-8", "replace")
        genuine = content.count("\ufffd".encode())
        return text, {"invalid_utf8": text.count("\ufffd") - genuine}


def repair_surrogates(text: str) -> tuple[str, dict[str, int]]:
    """JSON may spell half a surrogate pair, which is no character: it becomes U+FFFD, and is counted."""
    if text.isascii():
        return text, {}
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    replaced = whole.count("\ufffd") - text.count("\ufffd")
    return whole, {"lone_surrogate": replaced} if replaced else {}


@dataclass(frozen=True)
class TextFilesTask:
    """Files that are one document each."""

    position: Position
    source_bytes: int
    files: list[SourceFile]
    selection: Selection

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        yield from select(map(self._read, self.files), self.selection, counts)

    def _read(self, file: SourceFile) -> Document:
        with file.open() as stream:
            return Document(file.name, *decode_utf8(stream.read()))


def _blank_line_documents(file: SourceFile) -> Iterator[Document]:
    """Runs of lines between blank ones; a document keeps its lines, without the newline after the last."""
    lines: list[bytes] = []
    first_line = 0

    def close() -> Document:
        return Document(f"{file.name}:{first_line}", *decode_utf8(b"".join(lines).removesuffix(b"\n")))

    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                first_line = first_line if lines else number
                lines.append(line)
            elif lines:
                yield close()
                lines = []
        if lines:
            yield close()


@dataclass(frozen=True)
class JsonLinesTask:
    """The lines of a jsonl file that begin in [begin, end) bytes."""

    position: Position
    source_bytes: int
    file: SourceFile
    begin: int
    end: int
    settings: FilesSettings
    selection: Selection

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        with self.file.open() as stream:
            start = self.begin
            if self.begin:
                # A line begins in this range if the newline before it is at begin - 1 or later.
                stream.seek(self.begin - 1)
                start = self.begin - 1 + len(stream.readline())
            rows = _json_documents(stream, self.file, start, self.end, self.settings)
            yield from select(rows, self.selection, counts)


def _json_documents(
    stream: Iterable[bytes], file: SourceFile, start: int, end: int | None, settings: FilesSettings
) -> Iterator[Document | None]:
    offset = start
    for line in stream:
        if end is not None and offset >= end:
            return
        begin, offset = offset, offset + len(line)
        if not line.strip():
            continue
        text, changed = decode_utf8(line)
        where = f"{file.url}: line at byte {begin:,}"
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); repair the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: {type(row).__name__}, expected an object; repair the line")
        id = f"{file.name}:{begin}"
        yield row_document(row, settings.text_column, settings.id_column, id, where, changed)


def row_document(
    row: dict[str, Any], text_column: str, id_column: str | None, id: str, where: str, changed: dict[str, int]
) -> Document | None:
    """The document of a row, or None where the text is null; `id` serves where there is no id column.

    Raises UserError if a column is missing or the text is no string.
    """
    for column in (text_column, id_column):
        if column is not None and column not in row:
            raise UserError(f"{where}: no column '{column}'; it has {', '.join(map(str, row))}")
    text = row[text_column]
    if text is None:
        return None
    if isinstance(text, bytes):
        text, changed = decode_utf8(text)
    if not isinstance(text, str):
        raise UserError(f"{where}: column '{text_column}' holds {type(text).__name__}, not text")
    text, more = repair_surrogates(text)
    return Document(id if id_column is None else str(row[id_column]), text, {**changed, **more})


@contextmanager
def _parquet(file: SourceFile) -> Iterator[pyarrow.parquet.ParquetFile]:
    with file.open() as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.url}: not a parquet file ({error}); restore it") from None
        yield parquet


@dataclass(frozen=True)
class ParquetTask:
    """One row group of a parquet file."""

    position: Position
    source_bytes: int
    file: SourceFile
    row_group: int
    first_row: int
    settings: FilesSettings
    selection: Selection

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        yield from select(self._rows(), self.selection, counts)

    def _rows(self) -> Iterator[Document | None]:
        text_column, id_column = self.settings.text_column, self.settings.id_column
        columns = [column for column in (text_column, id_column) if column is not None]
        with _parquet(self.file) as parquet:
            known = parquet.schema_arrow.names
            if missing := [column for column in columns if column not in known]:
                raise UserError(f"{self.file.url}: no column '{missing[0]}'; it has {', '.join(known)}")
            table = parquet.read_row_group(self.row_group, columns=columns)
        texts = table.column(text_column)
        if pyarrow.types.is_string(texts.type) or pyarrow.types.is_large_string(texts.type):
            # As bytes, so that invalid UTF-8 is handled here as everywhere.
            place = table.column_names.index(text_column)
            table = table.set_column(place, text_column, texts.cast(pyarrow.large_binary()))
        for number in range(table.num_rows):
            row = {column: table.column(column)[number].as_py() for column in columns}
            where = f"{self.file.url}: row {self.first_row + number:,}"
            id = f"{self.file.name}:{self.first_row + number}"
            yield row_document(row, text_column, id_column, id, where, {})

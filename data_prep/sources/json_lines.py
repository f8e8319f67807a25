"""JSON lines become documents, many lines at a time; each line gives the document or the error that it gives alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import IO, TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.sources.documents import Document
from data_prep.sources.find import FoundFile
from data_prep.sources.text import beginning, decode_utf8, row_document

if TYPE_CHECKING:
    from data_prep.sources.files import FilesSettings

READ_BYTES = 1 << 18
JSON_SPACE = b" \t\r\n"
DECODER = json.JSONDecoder()


def json_documents(
    stream: IO[bytes], file: FoundFile, start: int, end: int | None, settings: FilesSettings
) -> Iterator[Document | None]:
    """The documents of the lines that begin in [start, end), many lines at a time."""
    begin = start
    while (end is None or begin < end) and (lines := _some_lines(stream, end and end - begin)):
        begins = list(accumulate(map(len, lines), initial=begin))
        begin = begins.pop()
        try:
            documents = _plain_documents(lines, begins, file, settings)
        except (ValueError, LookupError, TypeError, RecursionError):  # one line is empty, odd or at fault: each alone
            documents = _one_by_one(lines, begins, file, settings)
        yield from documents


def _some_lines(stream: IO[bytes], span: int | None) -> list[bytes]:
    """About `READ_BYTES` of lines, and none that begins after `span` bytes."""
    first = stream.readline()
    more = min(READ_BYTES, READ_BYTES if span is None else span) - len(first) - 1  # no further line is begun behind it
    return [first, *(stream.readlines(more) if more > 0 else [])] if first else []


def _plain_documents(
    lines: list[bytes], begins: list[int], file: FoundFile, settings: FilesSettings
) -> Iterator[Document | None]:
    """The documents of lines in which nothing is out of the ordinary; raises ValueError, LookupError, TypeError or
    RecursionError, which say no more than that something is."""
    rows = []
    for line in lines:
        text = line.strip(JSON_SPACE).decode()
        row, end = DECODER.raw_decode(text)
        if end != len(text):
            raise ValueError("more behind the row")
        rows.append(row)
    texts = [row[settings.text_column] for row in rows]
    if settings.id_column is None:
        ids = [f"{file.name}:{begin}" for begin in begins]
    else:
        ids = [str(row[settings.id_column]) for row in rows]
    "".join(chain(ids, texts)).encode()  # TypeError where a text is no string, ValueError for half a surrogate pair
    return map(Document, ids, texts)


def _one_by_one(
    lines: list[bytes], begins: list[int], file: FoundFile, settings: FilesSettings
) -> Iterator[Document | None]:
    for line, begin in zip(lines, begins, strict=True):
        line, mark = (line, {}) if begin else beginning(line, file.shown)
        if line.strip():
            yield _json_document(line, begin, mark, file, settings)


def _json_document(
    line: bytes, begin: int, mark: dict[str, int], file: FoundFile, settings: FilesSettings
) -> Document | None:
    text, changed = decode_utf8(line)
    where = f"{file.shown}: line at byte {begin:,}"
    if begin == 0 and text.lstrip().startswith("["):
        raise UserError(f"{where}: a JSON list; write one object per line, for example with `jq -c '.[]'`")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); repair the line (one object per line)") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}, expected an object; repair the line")
    id = f"{file.name}:{begin}"
    return row_document(row, settings.text_column, settings.id_column, id, where, {**mark, **changed})

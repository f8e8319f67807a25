"""Bytes and rows become text: UTF-8, columns, WikiText's articles; what had to be changed is counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.documents import Document

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
NUL_SHARE = 0.05  # of the first bytes of a file: more are UTF-16 without a mark, or no text at all
HEADING = re.compile(r" = ([^=].*[^=]|[^=]) = \n")


def beginning(content: bytes, where: str) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a text file without a byte-order mark, which is counted.

    Raises UserError for UTF-16 and for what is no text: read as UTF-8 it would be NULs and U+FFFD.
    """
    head = content[:4096]
    if head.startswith(UTF16_MARKS) or head.count(0) > NUL_SHARE * len(head):
        raise UserError(
            f"{where}: not UTF-8 (UTF-16, or no text at all); write it as UTF-8, for example with "
            "`iconv -f UTF-16 -t UTF-8`, or leave it out"
        )
    if content.startswith(BYTE_ORDER_MARK):
        return content[len(BYTE_ORDER_MARK) :], {"byte_order_mark": 1}
    return content, {}


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
    try:
        text.encode()
        return text, {}
    except UnicodeEncodeError:
        pass
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    replaced = whole.count("\ufffd") - text.count("\ufffd")
    return whole, {"lone_surrogate": replaced} if replaced else {}


def row_document(
    row: dict[str, Any], text_column: str, id_column: str | None, id: str, where: str, changed: dict[str, int]
) -> Document | None:
    """The document of a row, or None where the text is null; `id` serves where there is no id column.

    Raises UserError if a column is missing or the text is no string.
    """
    for column in (text_column, id_column):
        if column is not None and column not in row:
            raise UserError(f"{where}: no column '{column}'; it has {columns_shown(row)}")
    text = row[text_column]
    if text is None:
        return None
    if isinstance(text, bytes):
        text, changed = decode_utf8(text)
    if not isinstance(text, str):
        raise UserError(
            f"{where}: column '{text_column}' holds {type(text).__name__}, not text; name another with --text-column"
        )
    text, more = repair_surrogates(text)
    id = id if id_column is None else repair_surrogates(str(row[id_column]))[0]
    return Document(id, text, {**changed, **more})


def columns_shown(columns: Iterable[Any]) -> str:
    """The names of columns, in one line."""
    names = list(map(str, columns))
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(name if len(name) <= 40 else name[:40] + "…" for name in names[:20]) + more or "none"


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

"""Odd files of every kind that is read, each with the documents that are right, or None where there are none."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

Documents = list[str]

TEXTS = {
    "nothing": "",
    "a space": " ",
    "newlines": "\n\n\n",
    "no newline at the end": "one\ntwo",
    "Windows line ends": "one\r\ntwo\r\n",
    "old Mac line ends": "one\rtwo\r",
    "white space around": "  \t one  two \n\n ",
    "NUL": "a long enough text around a single \0 that is kept as it is, as every character of a text is",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f",
    "special pieces": "</s> <s> <unk> <pad> <0x41>",
    "a space mark": "a\u2581b",
    "the replacement character": "a\ufffdb",
    "unicode line ends": "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "ligatures and fractions": "ﬁ ½ … Å Å",
    "joined emoji": "👩‍👩‍👧 🏳️‍🌈",
    "right to left": "\u202bעברית العربية\u202c",
    "no characters": "\ufdd0 \ufffe \U0010ffff",
    "private use": "\ue000\U000f0000",
    "zero width": "a\u200bb\u200cc\u2060d",
    "a mark in the middle": "a\ufeffb",
    "many marks on one letter": "e" + "\u0301" * 2000,
    "one long word": "x" * 1_500_000,
    "one long line": "the same words " * 100_000,
    "many short lines": "a\n" * 200_000,
    "JSON": '{"text": "inside"}',
    "HTML": "<html><body>&amp;</body></html>",
}
BYTES = {
    "latin-1": "café naïve".encode("latin-1"),
    "a cut character": "naïve 🙂".encode()[:-2],
    "an overlong form": b"a\xc0\xafb",
    "a surrogate as bytes": b"a\xed\xa0\xbdb",
    "bytes that never occur": b"a\xfe\xffb" + b"c" * 100,
    "a byte-order mark": b"\xef\xbb\xbfone",
    "two byte-order marks": b"\xef\xbb\xbf\xef\xbb\xbfone",
    "nothing but a byte-order mark": b"\xef\xbb\xbf",
}
NOT_UTF8 = {
    "UTF-16, little end first": "one two".encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + "one two".encode("utf-16-be"),
    "UTF-16 without a mark": "one two three".encode("utf-16-le"),
    "UTF-32": "one two".encode("utf-32"),
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0",
    "zeros": bytes(5000),
}
LINES = {
    "broken": b'{"text": "a"',
    "a comma too many": b'{"text": "a",}',
    "single quotes": b"{'text': 'a'}",
    "a list": b'["a"]',
    "a string": b'"a"',
    "a number": b"5",
    "null": b"null",
    "another column": b'{"content": "a"}',
    "no columns": b"{}",
    "a number as text": b'{"text": 5}',
    "a list as text": b'{"text": ["a"]}',
    "two objects in a line": b'{"text": "a"}{"text": "b"}',
    "an object over lines": b'{\n"text": "a"\n}',
    "nested without end": b'{"text": "a", "more": ' + b"[" * 50_000,
    "a number without end": b'{"text": "a", "n": ' + b"9" * 10_000 + b"}",
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "a raw newline in a string": b'{"text": "a\nb"}',
    "NUL alone": b"\0",
}
GOOD_LINES: dict[str, tuple[bytes, Documents]] = {
    "blank lines": (b'\n\n{"text": "a"}\n \n{"text": "b"}\n', ["a", "b"]),
    "Windows line ends": (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
    "a byte-order mark": (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
    "the column twice": (b'{"text": "a", "text": "b"}\n', ["b"]),
    "null text among others": (b'{"text": null}\n{"text": "b"}\n', ["b"]),
    "half a surrogate pair": (b'{"text": "a\\ud83d"}\n', ["a\ufffd"]),
    "a pair in two escapes": (b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
    "NaN in another column": (b'{"text": "a", "n": NaN}\n', ["a"]),
    "a line longer than several tasks": (b'{"text": "' + b"x" * 3_000_000 + b'"}\n', ["x" * 3_000_000]),
    "invalid UTF-8": (b'{"text": "a\xffb"}\n', ["a\ufffdb"]),
}  # fmt: skip


@dataclass
class Case:
    """One input: what writes it into a folder and names its patterns; the right documents, None if there are none."""

    name: str
    write: Callable[[Path], list[str]]
    right: Documents | None
    settings: dict[str, Any] = field(default_factory=dict)


def expected(content: bytes) -> str:
    """The text of bytes, by the stated policy."""
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").replace("\u2581", " ")


def file_cases() -> Iterator[Case]:
    """Each kind of file with each odd content."""

    def written(name: str, content: bytes) -> Callable[[Path], list[str]]:
        def write(folder: Path) -> list[str]:
            (folder / name).write_bytes(content)
            return [str(folder / name)]

        return write

    contents = {**{name: text.encode() for name, text in TEXTS.items()}, **BYTES}
    for name, content in contents.items():
        right = [expected(content)]
        yield Case(f"txt: {name}", written("a.txt", content), right)
        yield Case(f"txt.gz: {name}", written("a.txt.gz", gzip.compress(content)), right)
        table = pyarrow.table({"text": pyarrow.array([content, b"second"], pyarrow.binary())})
        text = content.decode("utf-8", "replace").replace("\u2581", " ")
        yield Case(f"parquet: {name}", written("a.parquet", parquet(table)), [text, "second"])
    for name, text in TEXTS.items():
        line = json.dumps({"text": text}, ensure_ascii="HTML" in name).encode() + b"\n"
        right = [text.replace("\u2581", " ")]
        yield Case(f"jsonl: {name}", written("a.jsonl", line), right)
        yield Case(f"jsonl.zst: {name}", written("a.jsonl.zst", zstandard.compress(line)), right)
    for name, content in NOT_UTF8.items():
        for separator in ("file", "blank-lines", "wikitext-headings"):
            yield Case(f"txt, {separator}: {name}", written("a.txt", content), None, {"separator": separator})
    for name, line in LINES.items():
        for ending, packed in ((".jsonl", bytes), (".jsonl.gz", gzip.compress), (".JSON", bytes)):
            yield Case(f"{ending}: {name}", written(f"a{ending}", packed(b'{"text": "good"}\n' + line + b"\n")), None)
    for name, (lines, documents) in GOOD_LINES.items():
        yield Case(f"jsonl: {name}", written("a.jsonl", lines), documents)
        yield Case(f"jsonl.gz: {name}", written("a.ndjson.GZ", gzip.compress(lines)), documents)
    yield from archive_cases(written)
    yield from place_cases()


def parquet(table: pyarrow.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def archive_cases(written: Callable[[str, bytes], Callable[[Path], list[str]]]) -> Iterator[Case]:
    """Compressed files and parquet whose frame is odd."""
    line = b'{"text": "a"}\n'
    packed, framed = gzip.compress(line * 1000), zstandard.compress(line * 1000)
    many = ["a"] * 1000
    for name, file, content, right in (
        ("gz of two members", "a.jsonl.gz", packed + packed, many * 2),
        ("gz, cut", "a.jsonl.gz", packed[:-9], None),
        ("gz, only its head", "a.jsonl.gz", packed[:10], None),
        ("gz, a bit flipped", "a.jsonl.gz", packed[:30] + bytes([packed[30] ^ 8]) + packed[31:], None),
        ("gz that is none", "a.jsonl.gz", line, None),
        ("zst of two frames", "a.jsonl.zst", framed + framed, many * 2),
        ("zst, cut", "a.jsonl.zst", framed[:-3], None),
        ("zst that is none", "a.jsonl.zst", line, None),
        ("parquet within gz", "a.parquet.gz", gzip.compress(b"PAR1"), None),
        ("parquet of no bytes", "a.parquet", b"", None),
        ("parquet that is none", "a.parquet", b"PAR1 and so on PAR1", None),
    ):
        yield Case(name, written(file, content), right)
    strings = pyarrow.array(["a", "b"])
    tables = {
        "integers": (pyarrow.table({"text": [1, 2]}), None),
        "lists": (pyarrow.table({"text": [["a"], ["b"]]}), None),
        "structures": (pyarrow.table({"text": [{"text": "a"}]}), None),
        "times": (pyarrow.table({"text": pyarrow.array([1], pyarrow.timestamp("s"))}), None),
        "another column": (pyarrow.table({"body": strings}), None),
        "no rows": (pyarrow.table({"text": strings[:0]}), None),
        "nulls alone": (pyarrow.table({"text": pyarrow.nulls(3)}), None),
        "some nulls": (pyarrow.table({"text": ["a", None]}), ["a"]),
        "a dictionary": (pyarrow.table({"text": strings.dictionary_encode()}), ["a", "b"]),
        "large strings": (pyarrow.table({"text": strings.cast(pyarrow.large_string())}), ["a", "b"]),
        "a column beside with a dot": (pyarrow.table({"text": strings, "a.b": [1, 2]}), ["a", "b"]),
    }
    for name, (table, right) in tables.items():
        yield Case(f"parquet: {name}", written("a.parquet", parquet(table)), right)
    whole = parquet(pyarrow.table({"text": ["a"] * 100}), row_group_size=3)
    yield Case("parquet: many row groups", written("a.parquet", whole), ["a"] * 100)
    yield Case("parquet: cut", written("a.parquet", whole[:-100]), None)
    yield Case("parquet: garbled", written("a.parquet", whole[:10] + bytes(200) + whole[210:]), None)


def place_cases() -> Iterator[Case]:
    """Files whose names and places are odd."""
    names = ["my dir/päth [v1] (x)/a.txt", "a::b.txt", "a*.txt", "a?.txt", "[a].txt", "a#b.txt", "a b.TXT", "-.txt",
             "a=b.txt", "a%20b.txt", "a\nb.txt", "$HOME.txt", "'quoted'.txt", "a.tar.txt", "ü" * 60 + ".txt", "a.MD",
             ".hidden.txt"]  # fmt: skip

    def at(name: str) -> Callable[[Path], list[str]]:
        def write(folder: Path) -> list[str]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("the text")
            return [str(folder / name)]

        return write

    for name in names:
        yield Case(f"the name {name!r}", at(name), ["the text"])

    def after(act: Callable[[Path], Any], pattern: str = "") -> Callable[[Path], list[str]]:
        def write(folder: Path) -> list[str]:
            folder = folder / "d"
            folder.mkdir()
            act(folder)
            return [f"{folder}/{pattern}"]

        return write

    def hidden(folder: Path) -> None:
        (folder / ".git").mkdir()
        for name in ("a.txt", ".b.txt", ".git/c.txt"):
            (folder / name).write_text(name)

    def circle(folder: Path) -> None:
        (folder / "a.txt").write_text("a")
        (folder / "again").symlink_to(folder)

    def twice(folder: Path) -> None:
        for name in ("p1", "p2"):
            (folder / name).mkdir()
            (folder / name / "a.txt").write_text(name)

    def no_utf8(folder: Path) -> None:
        Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.txt")).write_text("a")

    link = Path.symlink_to
    yield Case("a folder with hidden files", after(hidden), ["a.txt"])
    yield Case("a pattern beside hidden files", after(hidden, "**/*.txt"), ["a.txt"])
    yield Case("a folder that links to itself", after(circle), ["a"])
    yield Case("one name in two folders", after(twice), ["p1", "p2"])
    yield Case("a name that is no UTF-8", after(no_utf8), ["a"])
    yield Case("a link to nowhere", after(lambda folder: link(folder / "a.txt", "nowhere"), "a.txt"), None)
    yield Case("a link to nowhere in a folder", after(lambda folder: link(folder / "a.txt", "nowhere")), None)
    yield Case("a link to itself", after(lambda folder: link(folder / "a.txt", "a.txt"), "a.txt"), None)
    yield Case("a pipe", after(lambda folder: os.mkfifo(folder / "a.txt"), "a.txt"), None)
    yield Case("a pipe in a folder", after(lambda folder: os.mkfifo(folder / "a.txt")), None)
    yield Case("a device", after(lambda folder: link(folder / "a.txt", "/dev/zero"), "a.txt"), None)
    yield Case("a folder of no file", after(lambda folder: None), None)
    yield Case("a folder called a.txt", after(lambda folder: (folder / "a.txt").mkdir(), "a.txt"), None)
    yield Case("other kinds alone", after(lambda folder: (folder / "a.pdf").write_text("")), None)
    yield Case("no such file", after(lambda folder: None, "a.txt"), None)
    yield Case("a pattern of nothing", after(lambda folder: None, "*.txt"), None)
    yield Case("a bad pattern", after(lambda folder: None, "[.txt"), None)
    yield Case("an empty path", lambda folder: [""], None)
    yield Case("a NUL in the path", lambda folder: ["a\0b.txt"], None)
    yield Case("an unknown kind of URL", lambda folder: ["nothing://a/b.txt"], None)
    yield Case("a URL without a host", lambda folder: ["http:///b.txt"], None)
    yield Case("a URL of no port", lambda folder: ["http://127.0.0.1:99999/b.txt"], None)

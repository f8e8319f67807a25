"""Odd files and faulty servers, against one rule: the right documents, or one plain line a problem.

A case is right if the preparation ends with exactly the expected documents in a dataset that verifies, or with a
`UserError` whose every line names what is wrong and what to do, and no manifest. Anything else breaks the rule: another
exception, other text, a dataset after an error, a wait beyond `LIMIT_SECONDS`, a process or a file in /dev/shm left.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from data_prep import remote
from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources import hub
from data_prep.sources.documents import TextSource
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.sources.hub import HubSettings, HubSource
from data_prep.tokenizers.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer
from data_prep.verify import documents_of, verify_dataset
from launch.hosts.node import free_port
from pipeline.data.remote import open_location
from tests.data_prep.hub_server import HubServer

LIMIT_SECONDS = 60
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


# --- servers ------------------------------------------------------------------------------------------------


class Answers(ThreadingHTTPServer):
    """A faulty server: it serves `files`, or what the server at `behind` answers, for some requests with a fault."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes] | None = None, behind: str = "", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.files, self.behind = files or {}, behind.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault, self.left, self.meant = "none", 0.0, re.compile("")
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up on purpose

    @contextlib.contextmanager
    def answering(self, fault: str, left: float, meant: str = "") -> Iterator[Callable[[], float]]:
        """Inside, the next `left` requests whose line `meant` matches are answered so; gives how many there were."""
        self.fault, self.left, self.meant, self.closing = fault, left, re.compile(meant), threading.Event()
        try:
            yield lambda: left - self.left
        finally:
            self.closing.set()
            self.left = 0

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


STATUSES = (204, 304, 400, 401, 403, 404, 408, 410, 416, 418, 425, 429, 451, 500, 501, 502, 503, 504, 505)
FAULTS = ["none", *map(str, STATUSES), "cut", "empty", "half", "half, unsaid", "shifted", "ranges ignored", "too much",
          "no length", "chunked", "chunked, cut", "gzip", "longer announced", "shorter announced", "redirect",
          "redirect loop",
          "redirect to a file", "redirect nowhere", "no HEAD", "HEAD lies", "garbage", "hangs up", "stalls", "a page",
          "drips", "a bad header"]  # fmt: skip
HARMLESS = ("none", "drips")
PASSING = ("429", "500", "502", "503", "504", "cut", "hangs up", "stalls")
"""After two of these all is well again."""
READERS = ["jsonl", "txt", "parquet", "verify", "train"]


class _Answer(BaseHTTPRequestHandler):
    server: Answers
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        server, line = self.server, f"{self.command} {self.path}"
        path = self.path.lstrip("/").removeprefix("moved/")
        fault = "none"
        if server.left > 0 and not self.path.startswith("/moved/") and server.meant.search(line):
            server.left -= 1
            fault = server.fault
        status, headers, body = self._asked_behind(path) if server.behind else self._from_memory(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if status == 200:
                self._answer(fault, body, path, headers)
            else:
                self._send(status, body, headers)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD

    def _from_memory(self, path: str) -> tuple[int, dict[str, str], bytes]:
        body = self.server.files.get(path.partition("?")[0])
        return (404, {}, b"no") if body is None else (200, {"ETag": '"1"'}, body)

    def _asked_behind(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """The whole of it: ranges are this server's affair."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("range", "connection")}
        asked = http.client.HTTPConnection(self.server.behind)
        asked.request("GET" if self.command == "HEAD" else self.command, f"/{path}", sent, kept)
        with contextlib.closing(asked), asked.getresponse() as answer:
            own = re.compile("content-length|connection|transfer-encoding|date|server|x-amz-checksum.*", re.I)
            headers = {name: value for name, value in answer.getheaders() if not own.fullmatch(name)}
            return answer.status, headers, answer.read()

    def _answer(self, fault: str, body: bytes, path: str, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, sent = 200, None
        if wanted and fault != "ranges ignored":
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            if fault.startswith("half") and last > first:
                last = (first + last) // 2
            shift = 1 if fault == "shifted" and first else 0
            status, total = 206, len(body)
            body = body[first - shift : last + 1 - shift]
            headers["Content-Range"] = f"bytes {first - shift}-{last - shift}/{total}"
            if fault in ("half, unsaid", "too much"):
                del headers["Content-Range"]
        elif fault.startswith("half"):
            sent = len(body) // 2
        length: int | None = len(body)
        if fault.isdigit():
            status, body, length = int(fault), b"", 0
        elif fault in ("cut", "chunked, cut"):
            sent = len(body) // 2
        elif fault == "empty":
            sent = 0
        elif fault == "too much":
            body, length = body + b"more", len(body) + 4
        elif fault in ("no length", "chunked", "chunked, cut"):
            length = None
        elif fault == "gzip":
            body = gzip.compress(body)
            length, headers["Content-Encoding"] = len(body), "gzip"
        elif fault in ("longer announced", "HEAD lies"):
            length = len(body) + 1000
        elif fault == "shorter announced":
            length = len(body) // 2
        elif fault.startswith("redirect"):
            places = {
                "redirect": f"/moved/{path}",
                "redirect loop": f"/{path}",
                "redirect to a file": "file:///etc/passwd",
            }
            status, body, length = 302, b"", 0
            headers["Location"] = places.get(fault, "http://127.0.0.1:9/nowhere")
        elif fault == "no HEAD" and self.command == "HEAD":
            status, body, length = 405, b"", 0
        elif fault == "garbage":
            self.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            self.close_connection = True
            return
        elif fault == "hangs up":
            self.close_connection = True
            return
        elif fault == "stalls":
            self.server.closing.wait(30)
            return
        elif fault == "a page":
            body = b"<html>Please log in</html>"
            length = len(body)
        elif fault == "a bad header":
            headers["Content-Length"], length = "many", None
        self._send(status, body, headers, length, sent, fault.startswith("chunked"), fault == "drips")

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = -1,
        sent: int | None = None, chunked: bool = False, drip: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = body if sent is None else body[:sent]
        if self.command == "HEAD":
            return
        if chunked:
            self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
            self.wfile.write(b"0\r\n\r\n" if sent is None else b"")
        elif drip:
            for start in range(0, len(body), max(1, len(body) // 20)):
                self.wfile.write(body[start : start + max(1, len(body) // 20)])
                time.sleep(0.005)
        else:
            self.wfile.write(body)
        if length != len(body) or chunked:
            self.close_connection = True


# --- the rule -----------------------------------------------------------------------------------------------


def run(folder: Path, share: int = 1, slow_share: int = 1) -> dict[str, object]:
    """The figures of the tour; of a short one every so many inputs only, `slow_share` at S3 and the hub."""
    tokenizer = small_tokenizer()
    broken: list[str] = []
    counts: Counter[str] = Counter()
    shared_memory, began = mapped_shared_memory(), time.monotonic()
    for number, case in enumerate(list(file_cases())[::share]):
        place = folder / f"file-{number}"
        place.mkdir()
        counts["odd files"] += 1
        verdict = judge(lambda case=case, place=place: prepare_case(case, place, tokenizer), place / "dataset")
        note(verdict, case.name, broken, counts)
    with short_waits():
        files = served(folder, tokenizer)
        for kind, servers, step in (("http", http_server, share), ("S3", s3_server, slow_share)):
            with servers(files) as (server, root):
                for number, (fault, left, reader) in enumerate(list(faulty_readings())[::step]):
                    place = folder / f"{kind}-{number}"
                    place.mkdir()
                    counts[kind] += 1
                    with server.answering(fault, left, requests_of(fault, kind)):
                        verdict = judge(
                            lambda r=reader, p=place, u=root: read_case(u, r, p, files, tokenizer), place / "dataset"
                        )
                    note_answer(verdict, fault, left, f"{kind}, {reader}", broken, counts)
    for verdict, fault, left, what in hub_answers(folder, slow_share):
        counts["hub"] += 1
        note_answer(verdict, fault, left, f"hub, {what}", broken, counts)
    if left_behind := mapped_shared_memory() - shared_memory:
        broken.append(f"left in /dev/shm: {', '.join(sorted(left_behind))}")
    if children := multiprocessing.active_children():
        broken.append(f"left running: {children}")
    assert not broken, "\n".join(broken)
    return {
        "odd files": counts["odd files"],
        "answers of faulty servers, times readers": f"http {counts['http']}, S3 {counts['S3']}, hub {counts['hub']}",
        "ended with the right documents": counts["done"],
        "refused in plain lines": counts["refused"],
        "broke the rule": len(broken),
        "longest allowed wait, seconds": LIMIT_SECONDS,
        "took, seconds": round(time.monotonic() - began),
    }


def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words to learn from, and no more"] * 20, TokenizerSettings(300))


def faulty_readings() -> Iterator[tuple[str, float, str]]:
    """Each fault, twice and always, to each reader."""
    yield from ((fault, left, reader) for fault in FAULTS for left in (2, 10**9) for reader in READERS)


def requests_of(fault: str, kind: str) -> str:
    """Of the web the answers with content; of S3 all, but where size and content would lie as one."""
    return "GET" if fault in ("204", "too much", "a page") or (kind == "http" and "HEAD" not in fault) else ""


def mapped_shared_memory() -> set[str]:
    """What this process has in /dev/shm, where other processes have files too."""
    return set(re.findall(r"/dev/shm/\S+", Path("/proc/self/maps").read_text()))


def note(verdict: str, name: str, broken: list[str], counts: Counter[str]) -> None:
    if verdict in ("done", "refused"):
        counts[verdict] += 1
    else:
        broken.append(f"{name}: {verdict}")
        print(broken[-1], flush=True)


def note_answer(verdict: str, fault: str, left: float, name: str, broken: list[str], counts: Counter[str]) -> None:
    """As `note`; where all is well, or soon again, there must be no refusal either."""
    if verdict == "refused" and (fault in HARMLESS or (left == 2 and fault in PASSING)):
        verdict = "refused, though the fault passes"
    note(verdict, f"{name}: {fault}, {'always' if left > 2 else 'twice'}", broken, counts)


def judge(act: Callable[[], str | None], dataset: Path) -> str:
    """`done`, `refused`, or how the rule was broken; `act` returns what is wrong with its result, if it ends."""

    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_SECONDS)
    try:
        return act() or "done"
    except UserError as error:
        for line in error.problems:
            if "\n" in line or not re.search(r"; |check |must be |no such file|give some", line):
                return f"not one line with a remedy: {line!r}"
        return "a manifest after an error" if (dataset / "manifest.json").exists() else "refused"
    except Late:
        return f"still at it after {LIMIT_SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


class Late(BaseException):
    """No `Exception`: what asks again after those must end here too."""


def prepare_case(case: Case, place: Path, tokenizer: Tokenizer) -> str | None:
    text = place / "text"
    text.mkdir()
    source = FilesSource(FilesSettings({"train": case.write(text)}, **case.settings))
    return prepared(source, place / "dataset", tokenizer, case.right)


def prepared(source: TextSource, folder: Path, tokenizer: Tokenizer, right: Documents | None) -> str | None:
    prepare(PrepareSettings(source, tokenizer, folder, chunk_tokens=1 << 16))
    if problems := verify_dataset(folder).problems:
        return f"a dataset that does not verify: {problems[0]}"
    dataset = open_dataset(folder)
    documents = [tokenizer.decode(tokens) for tokens in documents_of(dataset, dataset.split("train"))]
    if documents != right:
        return f"documents {str(documents)[:80]}, right are {str(right)[:80]}"
    return None


def served(folder: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What the servers have: the same documents in each form, and a dataset of them."""
    rows = [{"text": f"document {number} " + "word " * 200} for number in range(200)]
    text = folder / "served.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(FilesSettings({"train": [str(text)]}))
    prepare(PrepareSettings(source, tokenizer, folder / "served", chunk_tokens=1 << 13))
    files = {
        "a.jsonl": text.read_bytes(),
        "a.txt": "".join(row["text"] for row in rows).encode(),
        "a.parquet": parquet(pyarrow.Table.from_pylist(rows), row_group_size=50),
    }
    for path in (folder / "served").rglob("*"):
        if path.is_file():
            files[f"dataset/{path.relative_to(folder / 'served')}"] = path.read_bytes()
    return files


@contextlib.contextmanager
def http_server(files: dict[str, bytes]) -> Iterator[tuple[Answers, str]]:
    with Answers(files) as server:
        yield server, server.url


@contextlib.contextmanager
def s3_server(files: dict[str, bytes]) -> Iterator[tuple[Answers, str]]:
    """Faults before moto's server."""
    import s3fs
    from moto.server import ThreadedMotoServer

    behind = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    behind.start()
    before = dict(os.environ)
    try:
        with Answers(behind="http://127.0.0.1:{1}".format(*behind.get_host_and_port())) as server:
            os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            s3fs.S3FileSystem.clear_instance_cache()
            system = s3fs.S3FileSystem()
            system.makedirs("data", exist_ok=True)  # moto keeps what a process has put there
            for name, content in files.items():
                system.pipe_file(f"data/{name}", content)
            yield server, "s3://data"
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
        behind.stop()


def read_case(root: str, reader: str, place: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> str | None:
    if reader == "verify":
        report = verify_dataset(f"{root}/dataset")
        if report.problems:
            raise UserError(report.problems)
        return None
    if reader == "train":
        return trained_on(f"{root}/dataset", place, files)
    right = [json.loads(line)["text"] for line in files["a.jsonl"].splitlines()]
    query = "?token=secret" if root.startswith("http") else ""
    source = FilesSource(FilesSettings({"train": [f"{root}/a.{reader}{query}"]}))
    return prepared(source, place / "dataset", tokenizer, right if reader != "txt" else ["".join(right)])


HUB_PLACES = {"what the hub says": "/api/", "its files": "/resolve/"}


def hub_answers(folder: Path, share: int) -> list[tuple[str, str, float, str]]:
    """Verdict, fault, number and place; in a process of its own, as the hub's address is fixed at import."""
    port = free_port()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    before = dict(os.environ)
    os.environ |= settings
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(judge_hub, port, folder, share).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def judge_hub(port: int, folder: Path, share: int) -> list[tuple[str, str, float, str]]:
    """Faults before the hub's server, and the hub's reader behind them."""
    texts = [f"document {number} " + "word " * 50 for number in range(200)]
    table = parquet(pyarrow.table({"text": texts}), row_group_size=50)
    verdicts, tokenizer = [], small_tokenizer()
    with (
        HubServer("someone/text", "c" * 40, {"data/train-00000-of-00001.parquet": table}) as sound,
        Answers(behind=sound.url, port=port) as server,
        short_hub_waits(),
    ):
        cases = [(fault, left, what) for fault in FAULTS for left in (2, 10**9) for what in HUB_PLACES]
        for number, (fault, left, what) in enumerate(cases[::share]):
            place = folder / f"hub-{number}"
            sound.repository = f"someone/text-{number}"  # of one they have seen, libraries keep much
            with server.answering(fault, left, HUB_PLACES[what]):
                verdict = judge(
                    lambda p=place, n=sound.repository: prepared(HubSource(HubSettings(n)), p, tokenizer, texts), place
                )
            verdicts.append((verdict, fault, left, what))
    return verdicts


@contextlib.contextmanager
def short_hub_waits() -> Iterator[None]:
    """All the tries, with hardly any waiting between them."""
    import datasets

    hub.TIMEOUT_SECONDS = 0.3
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(float(seconds), 0.01))
    try:
        yield
    finally:
        time.sleep = sleep


def trained_on(url: str, place: Path, files: dict[str, bytes]) -> str | None:
    """Every shard as training reads it, through its cache."""
    dataset = open_location(url, place / "cache", 1 << 30)
    shards = dataset.shards("train")  # type: ignore[attr-defined]
    for shard in range(shards.index.num_shards):
        with os.fdopen(shards.open(shard), "rb") as file:
            if file.read() != files[f"dataset/{shards.index.shard_name(shard)}"]:
                return f"shard {shard} holds other bytes"
    return None


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """All the tries, without most of the waiting between them."""
    names = {"_FIRST_DELAY_SECONDS": 0.001, "_TIMEOUT_SECONDS": 0.3}
    before = {name: getattr(remote, name) for name in names}
    logging.disable(logging.WARNING)
    try:
        for name, value in names.items():
            setattr(remote, name, value)
        yield
    finally:
        logging.disable(logging.NOTSET)
        for name, value in before.items():
            setattr(remote, name, value)

"""Every kind of source gives its documents whole, in order, from any task on; bad input is named."""

from __future__ import annotations

import gzip
import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.packing import Position
from data_prep.sources.documents import ReadCounts, Selection, TextSource, batch_tasks, read_documents
from data_prep.sources.files import FilesSettings, FilesSource, JsonLinesTask, TextFilesTask
from data_prep.sources.sample import SampleArticles
from data_prep.sources.text import join_articles
from tests.data_prep.conftest import sentences

ODD = ["first", "", "two\nlines\n", "naïve 🙂 \u2028 end", " spaces  ", '"quotes" \\ and \t']
TEXTS = [*ODD, *sentences(2, 30)]


def texts_of(source: TextSource, split: str = "train") -> list[str]:
    return [document.text for document in read_documents(source, split)]


def counts_of(source: TextSource, split: str = "train") -> ReadCounts:
    counts = ReadCounts()
    for task in source.tasks(split):
        list(task.documents(counts))
    return counts


def write(folder: Path, kind: str, texts: list[str]) -> FilesSource:
    rows = [{"text": text, "id": f"id-{i}"} for i, text in enumerate(texts)]
    jsonl = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    settings = FilesSettings({"train": [f"{folder}/*"]}, id_column="id")
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt").write_bytes(text.encode())
        return FilesSource(FilesSettings({"train": [f"{folder}/*"]}))
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(jsonl)
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl))
    elif kind == "jsonl.zst":
        half = len(jsonl) // 2  # two frames, as `cat a.zst b.zst` makes them
        compressor = zstandard.ZstdCompressor()
        (folder / "a.jsonl.zst").write_bytes(compressor.compress(jsonl[:half]) + compressor.compress(jsonl[half:]))
    else:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return FilesSource(settings)


KINDS = ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_texts_exactly(kind, tmp_path):
    source = write(tmp_path, kind, TEXTS)
    assert texts_of(source) == TEXTS
    ids = [document.id for document in read_documents(source, "train")]
    expected = [f"{i:04d}.txt" if kind == "txt" else f"id-{i}" for i in range(len(TEXTS))]
    assert ids == expected
    assert counts_of(source) == ReadCounts(rows=len(TEXTS))


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_go_on_from_any_of_them(kind, tmp_path, monkeypatch):
    for module in ("documents", "files"):
        monkeypatch.setattr(f"data_prep.sources.{module}.TASK_BYTES", 300)
    source = write(tmp_path, kind, TEXTS)
    monkeypatch.setattr(batch_tasks, "__defaults__", (0, "", 300))
    tasks = list(source.tasks("train"))
    assert len(tasks) > 3
    assert [task.position for task in tasks] == sorted({task.position for task in tasks})
    whole = [[d.text for d in task.documents(ReadCounts())] for task in tasks]
    assert sum(whole, []) == TEXTS  # noqa: RUF017  a short list
    for i, task in enumerate(tasks):
        rest = [[d.text for d in t.documents(ReadCounts())] for t in source.tasks("train", task.position)]
        assert rest == whole[i:]


@settings(max_examples=100)
@given(st.lists(st.text(max_size=12), max_size=25), st.integers(1, 60))
def test_ranges_of_a_jsonl_file_share_its_lines_out(tmp_path_factory, texts, task_bytes):
    folder = tmp_path_factory.mktemp("jsonl")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "a.jsonl").write_bytes(("\n".join(lines) + ("\n" if len(texts) % 2 else "")).encode("utf-8", "replace"))
    expected = [json.loads(line.encode("utf-8", "replace"))["text"] for line in lines]
    chosen = FilesSettings({"train": [f"{folder}/a.jsonl"]})
    file = FilesSource(chosen)._split_files("train")[0]
    found = []
    for part, begin in enumerate(range(0, file.size, task_bytes)):
        end = min(begin + task_bytes, file.size)
        task = JsonLinesTask(Position(0, part), end - begin, file, begin, end, chosen, Selection("train"))
        found += [document.text for document in task.documents(ReadCounts())]
    assert found == expected


def test_blank_lines_part_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\none\ntwo\n\n \t\nthree\r\n\r\nfour")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "a.txt")]}, separator="blank-lines"))
    documents = list(read_documents(source, "train"))
    assert [d.text for d in documents] == ["one\ntwo", "three\r", "four"]
    assert [d.id for d in documents] == ["a.txt:3", "a.txt:7", "a.txt:9"]


def test_folders_patterns_and_splits(tmp_path):
    for name in ("b.txt", "a.txt", "held-out.txt", "notes.pdf"):
        (tmp_path / name).write_text(name)
    whole = FilesSource(FilesSettings({"train": [str(tmp_path)]}))
    assert texts_of(whole) == ["a.txt", "b.txt", "held-out.txt"]
    paths = {"train": [f"{tmp_path}/?.txt", f"{tmp_path}/a.txt"], "valid": [f"{tmp_path}/held*"]}
    split = FilesSource(FilesSettings(paths))
    assert (split.splits, texts_of(split), texts_of(split, "valid")) == (
        ["train", "valid"],
        ["a.txt", "b.txt"],
        ["held-out.txt"],
    )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_http_urls(kind, tmp_path):
    write(tmp_path, kind, TEXTS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        source = FilesSource(FilesSettings({"train": [f"{base}/a.{kind}"]}, id_column="id"))
        assert texts_of(source) == TEXTS
        with pytest.raises(UserError, match=r"gone.jsonl: no such file"):
            FilesSource(FilesSettings({"train": [f"{base}/gone.jsonl"]}))
    finally:
        server.shutdown()


# --- held-out shares -----------------------------------------------------------------------------------------


def test_shares_part_the_documents_by_their_text(tmp_path):
    texts = [f"document {i % 900}" for i in range(1000)]  # a hundred of them twice
    source = write(tmp_path, "jsonl", texts)
    shared = FilesSource(FilesSettings(source.paths, id_column="id", valid_share=0.1, test_share=0.05))
    assert shared.splits == ["train", "valid", "test"]
    parts = {split: texts_of(shared, split) for split in shared.splits}
    assert sorted(sum(parts.values(), [])) == sorted(texts)  # noqa: RUF017
    assert not set(parts["train"]) & set(parts["valid"]), "equal texts land on one side"
    assert 70 < len(parts["valid"]) < 130
    assert 30 < len(parts["test"]) < 75
    assert sum(counts_of(shared, split).rows for split in shared.splits) == 1000


def test_shares_do_not_depend_on_the_files(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one, other = write(tmp_path / "x", "jsonl", texts), write(tmp_path / "y", "txt", texts[::-1])
    held_out = [sorted(texts_of(FilesSource(FilesSettings(s.paths, valid_share=0.2)), "valid")) for s in (one, other)]
    assert held_out[0] == held_out[1]


# --- policies that are counted --------------------------------------------------------------------------------


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xf0\x9f\x99 end \xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xff"}\n{"text": "\\ud83d \\ud83d\\ude42"}\n{"text": null}\n')
    table = pyarrow.table({"text": pyarrow.array([b"ok", b"\xc3"], pyarrow.binary()).cast(pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    source = FilesSource(FilesSettings({"train": [str(tmp_path)]}))
    assert texts_of(source) == ["caf\ufffd and \ufffd end \ufffd", "x\ufffd", "\ufffd 🙂", "ok", "\ufffd"]
    counts = counts_of(source)
    assert counts.changed == {"invalid_utf8": 4, "lone_surrogate": 1}
    assert counts.dropped == {"null_text": 1}
    assert counts.rows == 6


def test_invalid_utf8_in_a_parquet_string_column(tmp_path):
    strings = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ok\xc3x")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "a.parquet")]}))
    assert texts_of(source) == ["ok", "\ufffdx"]
    assert counts_of(source).changed == {"invalid_utf8": 1}


# --- messages --------------------------------------------------------------------------------------------------


def test_all_problems_with_paths_at_once(tmp_path):
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(UserError) as caught:
        FilesSource(
            FilesSettings({"train": [f"{tmp_path}/*.txt", f"{tmp_path}/a.pdf"], "valid": [f"{tmp_path}/b.txt"]})
        )
    assert caught.value.problems == [
        f"{tmp_path}/*.txt: matches no file; check the pattern (quote it against the shell; "
        "hidden files must be named)",
        f"{tmp_path}/a.pdf: unknown kind of file; known endings: .txt, .text, .md, .raw, .jsonl, .ndjson, .json, "
        ".parquet (txt and jsonl also with .gz or .zst after them)",
        f"{tmp_path}/b.txt: no such file",
    ]


def test_no_paths_and_bad_shares_are_refused(tmp_path):
    with pytest.raises(UserError, match="no files named; give some with --path PATTERN"):
        FilesSource(FilesSettings({}))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"valid_share is 1.5; it must be 0 or more, and less than 1"):
        FilesSource(FilesSettings({"train": [str(tmp_path / "a.txt")]}, valid_share=1.5))
    paths = {"train": [str(tmp_path / "a.txt")], "valid": [str(tmp_path / "a.txt")]}
    with pytest.raises(UserError, match="split 'valid' has files of its own and a share of train too; choose one"):
        FilesSource(FilesSettings(paths, valid_share=0.1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a.jsonl: line at byte 13: not JSON \(.*\); repair the line"),
        ("[1]", "a.jsonl: line at byte 13: list, expected an object; repair the line"),
        ('{"content": "x"}', "a.jsonl: line at byte 13: no column 'text'; it has content"),
        ('{"text": 5}', "a.jsonl: line at byte 13: column 'text' holds int, not text"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text":"a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        texts_of(FilesSource(FilesSettings({"train": [str(tmp_path / "a.jsonl")]})))


def test_bad_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(UserError, match=r"a.parquet: not a parquet file \(.*\); restore it"):
        texts_of(FilesSource(FilesSettings({"train": [str(tmp_path / "a.parquet")]})))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: no column 'text'; it has body, url"):
        texts_of(FilesSource(FilesSettings({"train": [str(tmp_path / "b.parquet")]})))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 20])
def test_cut_compressed_files_are_named(kind, cut, tmp_path):
    source = write(tmp_path, kind, TEXTS)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"a.{kind}: cannot be read \(OSError: Truncated.*\).*, or restore the file"):
        texts_of(source)


def test_a_file_of_two_splits_is_left_out_of_train_or_refused(tmp_path):
    for name in ("a.txt", "held-out.txt"):
        (tmp_path / name).write_text(name)
    held = [f"{tmp_path}/held-out.txt"]
    source = FilesSource(FilesSettings({"train": [f"{tmp_path}/*.txt"], "valid": held}))
    assert (texts_of(source), texts_of(source, "valid")) == (["a.txt"], ["held-out.txt"])
    assert source.notes == [f"{held[0]}: left out of train, as it is named for valid"]
    with pytest.raises(UserError, match=r"held-out.txt: named for valid and for test; .* belongs to one split: choose"):
        FilesSource(FilesSettings({"train": [f"{tmp_path}/*.txt"], "valid": held, "test": held}))


def test_a_document_that_wants_much_memory_is_said(tmp_path):
    with open(tmp_path / "all.txt", "wb") as file:
        file.truncate(2 << 30)
    (tmp_path / "small.txt").write_text("small")
    paths = {"train": [f"{tmp_path}/*.txt"]}
    assert FilesSource(FilesSettings(paths)).notes == [
        f"{tmp_path}/all.txt: one document of 2.1 GB, which takes up to 19 GB of memory; --separator blank-lines makes "
        "a document of each run of lines between blank ones"
    ]
    assert FilesSource(FilesSettings(paths, separator="blank-lines")).notes == []


def test_a_line_longer_than_many_tasks_is_read_once(tmp_path, monkeypatch):
    """Each task looks for the end of a line that began before it in its own bytes alone."""
    monkeypatch.setattr("data_prep.sources.files.TASK_BYTES", 1000)
    texts = ["a", "x" * 100_000, "b"]
    source = write(tmp_path, "jsonl", texts)
    read = 0

    def counted(*arguments):
        stream = io.open(*arguments)  # noqa: SIM115, UP020
        original = stream.readline

        class Counting(io.BufferedReader):
            def readline(self, limit=-1):
                nonlocal read
                line = original(limit)
                read += len(line)
                return line

            def seek(self, *place):
                return stream.seek(*place)

        return Counting(io.BytesIO())

    monkeypatch.setattr("data_prep.sources.files.open", counted, raising=False)
    assert texts_of(source) == texts
    assert read < 3 * (tmp_path / "a.jsonl").stat().st_size


def test_a_byte_order_mark_is_dropped_and_counted_and_utf16_refused(tmp_path):
    for name, content in (("a.txt", "one"), ("b.jsonl", '{"text": "two"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    source = FilesSource(FilesSettings({"train": [str(tmp_path)]}))
    assert texts_of(source) == ["one", "two"]
    assert counts_of(source).changed == {"byte_order_mark": 2}
    (tmp_path / "a.txt").write_text("one", encoding="utf-16")
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 .*; write it as UTF-8, for example with `iconv"):
        texts_of(FilesSource(FilesSettings({"train": [str(tmp_path)]})))


def test_a_wikitext_file_becomes_its_articles(tmp_path):
    text = " \n = One = \n \n text \n = 1 rad / s = \n more \n \n = Two = \n \n text"
    (tmp_path / "a.raw").write_text(text)
    source = FilesSource(FilesSettings({"train": [str(tmp_path)]}, separator="wikitext-headings"))
    documents = list(read_documents(source, "train"))
    assert [document.id for document in documents] == ["a.raw:0:One", "a.raw:1:Two"]
    assert "".join(document.text for document in documents) == text


# --- wikitext and the sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["valid", "test"])
def test_wikitext_articles_joined_are_the_file(real_text, split):
    text = (real_text / "wikitext" / f"wiki.{split}.raw").read_bytes().decode()
    articles = list(join_articles(line + "\n" for line in text.split("\n")[:-1]))
    assert len(articles) == 60
    assert "".join(article for _, article in articles) == text


def test_headings_need_blank_lines_around_them():
    lines = [" \n", " = One = \n", " \n", " text \n", " = 1 rad / s = \n", " more \n", " \n", " = = Part = = \n"]
    lines += [" \n", " = Two = \n", " \n", " text \n"]
    articles = list(join_articles(lines))
    assert [title for title, _ in articles] == ["One", "Two"]
    assert "".join(text for _, text in articles) == "".join(lines)
    assert list(join_articles([])) == []


def test_sample_articles_are_the_same_in_any_process_and_order():
    source = SampleArticles()
    tasks = list(source.tasks("valid"))
    forward = [next(iter(task.documents(ReadCounts()))) for task in tasks]
    backward = [next(iter(task.documents(ReadCounts()))) for task in reversed(tasks)]
    assert forward == backward[::-1]
    assert len(forward) == 6
    for document in forward:
        assert document.text.startswith(document.id)
        assert "[[" not in document.text
        assert "'''" not in document.text


def test_a_text_task_reads_its_files_only_when_run(tmp_path):
    source = write(tmp_path, "txt", TEXTS)
    task = next(iter(source.tasks("train")))
    assert isinstance(task, TextFilesTask)
    (tmp_path / "0000.txt").unlink()
    with pytest.raises(UserError, match=r"0000.txt: cannot be read"):
        list(task.documents(ReadCounts()))

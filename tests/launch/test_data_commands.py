"""Commands about data: contradictory and impossible options are one line at once; exit codes hold every time."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest

from data_prep import remote
from data_prep.packing import START, Position
from data_prep.sources.choice import SOURCES, Registered, SourceOptions
from data_prep.sources.documents import BatchTask, Document, ReadCounts
from data_prep.tokenizers.hf_tokenizer import write_tokenizer
from data_prep.tokenizers.tokenizer import TokenizerSettings, train_tokenizer
from launch.cli import main
from tests.conftest import ROOT
from tests.data_prep.conftest import sentences


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"some text in {name} of more than a few words\n" * 20)
    write_tokenizer(folder / "tokenizer", train_tokenizer(sentences(0, 400), TokenizerSettings(vocab_size=400)))
    return folder


FILES = ["--source", "files", "--path", "{place}/a.txt"]
PREPARE = ["prepare", "--tokenizer", "{place}/tokenizer", "--output", "{place}/never"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [*PREPARE, *FILES, "--valid-share", "0.6", "--test-share", "0.6"],
            "leave nothing for train; together they",
        ),
        ([*PREPARE, *FILES, "--valid-share", "nan"], "valid_share is nan; it must be 0 or more, and less than 1"),
        ([*PREPARE, *FILES, "--minimum-characters", "-3"], "minimum_characters is -3; it must be 0 or more"),
        ([*PREPARE, *FILES, "--workers", "0"], "workers is 0; it must be 1 to 1,024"),
        ([*PREPARE, *FILES, "--workers", "1000000"], "workers is 1000000; it must be 1 to 1,024"),
        ([*PREPARE, "--source", "hub"], "--source hub needs --dataset ID, such as"),
        ([*PREPARE, "--source", "books"], "--source books: unknown; it is one of sample, files, wikitext-103, hub"),
        (
            [*PREPARE, "--source", "wikitext-103", "--test-share", "0.1"],
            "--test-share goes with --source files or hub, not with wikitext-103",
        ),
        ([*PREPARE, *FILES, "--dataset", "a/b"], "--dataset goes with --source hub, not with files"),
        ([*PREPARE, "--source", "files"], "no files named; give some with --path PATTERN"),
        ([*PREPARE, "--source", "files", "--path", ""], "no path; give a file, a folder, a pattern or a URL"),
        ([*PREPARE[:-1], "", *FILES], "'' names no folder; give one, or a URL"),
        ([*PREPARE, *FILES, "--path", "valid={place}/a.txt"], "no file is left for train: all are named for valid too"),
        (
            ["tokenizer", "--output", "{place}/never", *FILES, "--vocab-size", "-1"],
            "vocab_size is -1; the least is",
        ),
        (
            ["tokenizer", "--output", "{place}/never", *FILES, "--training-bytes", "0"],
            "training_bytes is 0; it must be",
        ),
        (["verify", "{place}/a.txt"], "a file, not a dataset folder; give the folder that `globallocal prepare` made"),
        (["verify", "{place}", "--quick", "--deep"], "--quick and --deep contradict each other; choose one"),
    ],
)
def test_contradictory_options_are_one_line_at_once(arguments, line, place, capfd):
    assert main([word.replace("{place}", str(place)) for word in arguments]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert line in errors[0]
    assert not (place / "never").exists()


def test_what_cannot_be_shown_or_written_is_one_line(place, capfd):
    options = ["--source", "files", "--path", str(place / "a.txt"), "--workers", "1"]
    assert main(["prepare", *options, "--tokenizer", str(place / "tokenizer"), "--output", str(place / "data")]) == 0
    capfd.readouterr()
    for options, line in (
        (["--sample", "0", "--sequence-length", "0"], "sequence_length is 0; it must be 1 or more"),
        (["--sample", "0", "--sequence-length", "100000"], "too few for a sample of 100,000; ask for a shorter"),
        (["--html", "/proc/page.html"], "/proc/page.html: cannot be written; "),
    ):
        assert main(["inspect", str(place / "data"), *options]) == 2
        errors = capfd.readouterr().err
        assert line in errors
        assert errors.count("\n") == 1


def test_the_page_of_a_dataset_shows_text_as_text(place, tmp_path):
    text = "Hôtel 漢字 🙂\n<script>document.title='owned'</script> & <img src=x onerror=alert(1)>"
    (tmp_path / "odd.txt").write_text(text)
    options = ["--source", "files", "--path", str(tmp_path / "odd.txt"), "--workers", "1"]
    prepare = ["prepare", *options, "--tokenizer", str(place / "tokenizer"), "--output", str(tmp_path / "data")]
    assert main(prepare) == 0
    assert main(["inspect", str(tmp_path / "data"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<title>files: " in page
    assert page.count("<script") == page.count("<img") == 0
    spans = re.findall(r'<span class="t\d" title="[\d ]+">(.*?)</span>', page, re.DOTALL)
    assert html.unescape("".join(spans)).removesuffix("</s>") == text.replace("\n", "↵\n")
    assert "漢" in spans  # one character, of three bytes that are pieces of their own


def test_no_secret_of_a_url_is_printed(place, capfd, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.001)
    url = "http://bob:hidden@127.0.0.1:9/a.jsonl?token=secret"
    options = ["--source", "files", "--path", url, "--tokenizer", str(place / "tokenizer")]
    assert main(["prepare", *options, "--output", str(place / "never")]) == 2
    said = "".join(capfd.readouterr())
    assert "http://127.0.0.1:9/a.jsonl: ConnectionError [Errno 111] Connection refused, after 8 tries; check" in said
    assert "hidden" not in said
    assert "secret" not in said


def test_a_parquet_column_of_integers_is_exit_code_2_every_time(place):
    """The process must also end well: a thread that still reads would abort it."""
    file = place / "integers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": list(range(1000))}), file, row_group_size=10)
    options = ["--source", "files", "--path", str(file), "--workers", "1"]
    command = [sys.executable, "-m", "launch", "prepare", *options, "--tokenizer", str(place / "tokenizer")]
    for number in range(5):
        job = subprocess.run(
            [*command, "--output", str(place / f"out-{number}")], cwd=ROOT, capture_output=True, text=True
        )
        line = f"error: {file}: column 'text' holds int64, not text; name another with --text-column\n"
        assert (job.returncode, job.stderr) == (2, line)


class Numbers:
    """A source of a few documents, as another project would write it."""

    name = "numbers"
    takes: ClassVar = frozenset({"valid_share"})
    notes: ClassVar[list[str]] = ["numbers have no end"]
    settings: ClassVar[dict[str, Any]] = {"numbers": 50}
    splits: ClassVar[list[str]] = ["train"]

    @classmethod
    def from_options(cls, options: SourceOptions) -> Numbers:
        return cls()

    def fingerprint(self) -> str:
        return "fifty"

    def changed(self, split: str) -> list[str]:
        return []

    def total_bytes(self, split: str) -> int | None:
        return None

    def tasks(self, split: str, start: Position = START) -> Iterator[BatchTask]:
        batch = [Document(str(number), f"number {number}") for number in range(50)]
        yield BatchTask(Position(0, 0), 500, batch, ReadCounts(rows=50), "numbers")


def test_a_new_source_is_one_class_and_one_registration(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOURCES, "numbers", Registered(f"{__name__}:Numbers", "the numbers"))
    command = ["prepare", "--source", "numbers", "--tokenizer", f"{place}/tokenizer", "--output", f"{tmp_path}/d"]
    assert main([*command, "--valid-share", "0", "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "note: numbers have no end" in said.out
    assert "train: 50 documents" in said.out
    assert main([*command, "--path", "x"]) == 2
    assert "--path goes with --source files, not with numbers" in capsys.readouterr().err


def test_the_sample_without_its_text_says_what_to_install(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_prep.sources.sample.find_spec", lambda name: None)
    assert main(["prepare", "--tokenizer", f"{place}/tokenizer", "--output", f"{tmp_path}/d"]) == 2
    line = "error: --source sample: its text is not installed; `pip install 'globallocal[sample]'`"
    assert capsys.readouterr().err.startswith(line)

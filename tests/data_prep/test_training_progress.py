"""What a tokenizer learns from when there is more text than it may take, and what it says meanwhile."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.packing import START, Position
from data_prep.sources.documents import Document, ReadCounts, Task
from data_prep.tokenizers.tokenizer import TokenizerSettings, train_tokenizer
from data_prep.tokenizers.train import spread_texts
from data_prep.tokenizers.training_progress import Pace, SentencepieceLog, heard
from tests.conftest import ROOT
from tests.data_prep.conftest import sentences

TEXT = "x" * 1000


@dataclass(frozen=True)
class OneText:
    number: int
    source_bytes: int
    name = ""

    @property
    def position(self) -> Position:
        return Position(0, self.number)

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        yield Document(str(self.number), f"{self.number:03d}{TEXT[3:]}")


class Texts:
    """Texts of 1,000 bytes that take `stored_bytes` each where they lie."""

    name, notes, settings, splits = "texts", list[str](), dict[str, Any](), ["train"]

    def __init__(self, count: int, stored_bytes: int, is_known: bool = True) -> None:
        self.count, self.stored_bytes, self.is_known = count, stored_bytes, is_known

    def fingerprint(self) -> str | None:
        return None

    def changed(self, split: str) -> list[str]:
        return []

    def total_bytes(self, split: str) -> int | None:
        return self.count * self.stored_bytes if self.is_known else None

    def tasks(self, split: str, start: Position = START) -> Iterator[Task]:
        return (OneText(number, self.stored_bytes) for number in range(self.count))


def taken(source: Texts, training_bytes: int) -> list[int]:
    return [int(text[:3]) for text in spread_texts(source, training_bytes, Pace("reading", io.StringIO()))]


@pytest.mark.parametrize("stored_bytes", [1000, 250])
def test_what_is_learned_from_is_spread_over_all_of_a_larger_text(stored_bytes: int) -> None:
    """Also where it is stored compressed, so that its bytes on disk say less than it holds."""
    numbers = taken(Texts(200, stored_bytes), 20_000)
    assert numbers == list(range(0, 200, 10))


def test_a_smaller_text_is_taken_whole_and_one_of_unknown_size_from_its_beginning() -> None:
    assert taken(Texts(20, 1000), 20_000) == list(range(20))
    assert taken(Texts(20, 1000, is_known=False), 5_000) == list(range(20))  # `training_lines` ends it


@pytest.mark.parametrize(
    ("model_type", "lines", "share"),
    [
        ("bpe", ["bpe_model_trainer.cc:421] Merged: freq=33 merges=1000 piece=vest"], 1000 / 4000),
        (
            "unigram",
            ["unigram_model_trainer.cc:514] Initialized 18744 seed pieces", "EM sub_iter=0 size=9372 obj=10.3 num=1"],
            0.5,
        ),
        ("bpe", ["trainer_interface.cc:446] Loaded all 7135 sentences"], 0.0),
    ],
)
def test_sentencepieces_log_says_how_far_it_is(model_type: Any, lines: list[str], share: float) -> None:
    log = SentencepieceLog(TokenizerSettings(4260, model_type))
    for line in lines:
        log.hear(line)
    assert log.share == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_what_others_write_while_sentencepiece_trains_is_passed_on(model_type: Any, capfd: Any) -> None:
    settings = TokenizerSettings(300, model_type)
    said = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  no memory\n"

    def texts() -> Iterator[str]:
        os.write(2, said.encode())
        yield from sentences(5, 300)

    with heard(settings):
        train_tokenizer(texts(), settings, log=True)
    assert capfd.readouterr().err == said


def test_a_pace_says_the_time_that_is_left() -> None:
    out = io.StringIO()
    Pace("reading", out, line_seconds=0)("1.00 of 4.00 GB", 0.25)
    Pace("reading", out, line_seconds=1000)("not yet", 0.25)
    assert out.getvalue() == "reading: 1.00 of 4.00 GB, 25 %, 0 s left\n"


LARGE = """
import resource, sys
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.tokenizer import TokenizerSettings
from data_prep.tokenizers.train import _Job
source = FilesSource(FilesSettings({"train": [sys.argv[1]]}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_Job(TokenizerSettings(400, training_bytes=2_000_000), train=True)(source)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_follows_the_text_that_is_learned_from_not_the_text_there_is(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    words = [f"word{number % 977} and {number % 31}" for number in range(40_000)]
    line = '{"text": "' + " ".join(words[:500]) + '"}\n'
    with open(path, "w") as file:
        for number in range(250_000_000 // len(line)):
            file.write(line.replace("word1 ", f"word{number} ", 1))
    command = [sys.executable, "-c", LARGE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # kibibytes; the text has 250,000

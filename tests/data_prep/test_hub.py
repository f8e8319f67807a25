"""Streaming from the hub: the published bytes, however badly the server behaves, or one clear error.

The server runs here; the client is a process of its own, as the hub's address is fixed at its start.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.manifest import open_dataset
from data_prep.packing import START, Position
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.documents import BatchTask, Document, ReadCounts
from data_prep.sources.hub import HubSettings, HubSource, WikitextSource
from data_prep.sources.text import join_articles
from data_prep.verify import verify_dataset
from tests.data_prep.conftest import folder_bytes
from tests.data_prep.faulty_servers import Answers
from tests.data_prep.hub_server import HubServer

README = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
  - split: validation
    path: wikitext-103-raw-v1/validation-*
---
"""

PROGRAM = """
import sys, time
from data_prep.sources import hub
from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.tokenizers.tokenizer import load_tokenizer

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))  # all retries, without most of the waiting

class HeldOut(hub.WikitextSource):
    splits = ["valid", "test"]

tokenizer, output = sys.argv[1:]
settings = PrepareSettings(HeldOut(), load_tokenizer(tokenizer), output, chunk_tokens=4096, chunks_per_shard=4)

def progress(state):
    print(state.split, state.documents, flush=True)
    sys.stdin.readline()

try:
    prepare(settings, progress)
except UserError as error:
    print(*error.problems, sep="\\n", file=sys.stderr)
    sys.exit(2)
"""


def parquet_of(text: str) -> bytes:
    """The hub's form of a wikitext file: a row a line, blank lines empty."""
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    table = pyarrow.table({"text": ["" if line == " \n" else line for line in lines]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=500)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def texts(real_text: Path) -> dict[str, str]:
    return {s: (real_text / "wikitext" / f"wiki.{s}.raw").read_bytes().decode() for s in ("valid", "test")}


@pytest.fixture
def hub(texts: dict[str, str]) -> Iterator[HubServer]:
    files = {
        "README.md": README.encode(),
        "wikitext-103-raw-v1/validation-00000-of-00001.parquet": parquet_of(texts["valid"]),
        "wikitext-103-raw-v1/test-00000-of-00001.parquet": parquet_of(texts["test"]),
    }
    with HubServer("Salesforce/wikitext", WikitextSource.REVISION, files) as server:
        yield server


def start(hub: HubServer, tokenizer: Path, output: Path) -> subprocess.Popen[str]:
    home = output.parent / "hub-home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": os.getcwd()}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PROGRAM, str(tokenizer), str(output)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = job.communicate("\n" * 10_000, timeout=120)
    return job.returncode, errors


@dataclass
class ArticlesSource:
    """The articles of the local files, from memory."""

    texts: dict[str, str]
    name: str = "articles"

    settings = {}  # noqa: RUF012

    @property
    def splits(self):
        return list(self.texts)

    def fingerprint(self):
        return ""

    def changed(self, split):
        return []

    def total_bytes(self, split):
        return None

    def tasks(self, split, start=START):
        lines = (line + "\n" for line in self.texts[split].split("\n")[:-1])
        articles = [Document(f"{i}:{title}", text) for i, (title, text) in enumerate(join_articles(lines))]
        yield BatchTask(Position(0, 0), 0, articles, ReadCounts(rows=len(articles)))


@pytest.fixture(scope="module")
def expected(texts, real_tokenizer, tmp_path_factory) -> dict[str, bytes]:
    """Every file of the dataset made from the local files, but for the manifest, which names its source."""
    folder = tmp_path_factory.mktemp("expected") / "dataset"
    prepare(PrepareSettings(ArticlesSource(texts), real_tokenizer, folder, chunk_tokens=4096, chunks_per_shard=4))
    return {name: content for name, content in folder_bytes(folder).items() if name != "manifest.json"}


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_bytes(folder).items() if name != "manifest.json"}


@pytest.fixture(scope="module")
def tokenizer_path(real_tokenizer) -> Path:
    return Path(real_tokenizer.where).parent


def test_bad_server_and_a_restart_change_no_byte(hub, tokenizer_path, expected, texts, tmp_path):
    hub.faults.bad_gateway, hub.faults.cut_body, hub.faults.slow = 3, 2, 1
    job = start(hub, tokenizer_path, tmp_path / "dataset")
    assert job.stdout is not None
    assert job.stdin is not None
    assert job.stdout.readline().startswith("valid"), job.stderr
    hub.stop()
    job.stdin.write("\n" * 10_000)
    job.stdin.flush()
    time.sleep(1)
    hub.start()
    code, errors = finish(job)
    assert code == 0, errors
    assert (hub.faults.bad_gateway, hub.faults.cut_body, hub.faults.slow) == (0, 0, 0)
    assert content_of(tmp_path / "dataset") == expected
    dataset = open_dataset(tmp_path / "dataset")
    assert dataset.manifest.source.fingerprint == WikitextSource.REVISION
    for split, text in texts.items():
        info = dataset.manifest.splits[split]
        assert (info.documents, info.source_bytes) == (60, len(text.encode()))
        assert info.words + info.lines == {"valid": 217_646, "test": 245_569}[split]
    assert verify_dataset(tmp_path / "dataset").problems == []


def test_hub_that_stays_away_is_one_clear_error_and_a_rerun_goes_on(hub, tokenizer_path, expected, tmp_path):
    job = start(hub, tokenizer_path, tmp_path / "dataset")
    assert job.stdout is not None
    job.stdout.readline()
    hub.faults.broken = True
    code, errors = finish(job)
    said = [line for line in errors.splitlines() if line.startswith("Salesforce")]
    lines = [line for line in said if not re.search(r"; try \d of 4 in \d+ s$", line)]
    assert (code, len(lines), len(said)) == (2, 1, 4), errors
    assert "the hub could not be read in 4 attempts over 65 seconds" in lines[0]
    assert "check the network and HF_ENDPOINT, then run the same command again" in lines[0]
    assert "Traceback" not in errors
    assert not (tmp_path / "dataset" / "manifest.json").exists()
    hub.faults.broken = False
    code, errors = finish(start(hub, tokenizer_path, tmp_path / "dataset"))
    assert code == 0, errors
    assert content_of(tmp_path / "dataset") == expected


def test_another_text_under_the_same_name_is_refused(hub, texts, tokenizer_path, tmp_path):
    name = "wikitext-103-raw-v1/validation-00000-of-00001.parquet"
    hub.files[name] = parquet_of(texts["valid"].removesuffix(" \n"))
    code, errors = finish(start(hub, tokenizer_path, tmp_path / "dataset"))
    assert code == 2
    assert "split 'valid' has 3,759 rows, published are 3,760; the hub's copy is another text" in errors


HUB_PROGRAM = """
import json, sys
from data_prep.sources import hub
hub.RETRY_SECONDS = (0, 0, 0)
from data_prep.sources.documents import read_documents
from data_prep.errors import UserError
from data_prep.sources.hub import HubSettings, HubSource
for question in range(1, len(sys.argv), 4):
    repository, configuration, text_column, valid_share = sys.argv[question : question + 4]
    settings = HubSettings(repository, configuration, text_column=text_column, valid_share=float(valid_share))
    try:
        source = HubSource(settings)
        documents = {split: [(d.id, d.text) for d in read_documents(source, split)] for split in source.splits}
        print(json.dumps([source.settings["revision"], documents]))
    except UserError as error:
        print(*error.problems, sep="\\n")
"""


def ask(hub: HubServer | Answers, tmp_path: Path, *arguments: str, program: str = HUB_PROGRAM) -> str:
    """What one process of `HUB_PROGRAM` says to its questions of four arguments each."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    job = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 0, job.stderr
    return job.stdout


def test_any_dataset_of_the_hub(tmp_path):
    rows = [{"id": i, "content": f"text {i}"} for i in range(200)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    files = {"data/train-00000-of-00001.parquet": buffer.getvalue()}
    with HubServer("someone/text", "c" * 40, files) as hub:
        questions = (
            *("someone/text", "default", "content", "0.1"),
            *("someone/text", "default", "text", "0"),
            *("someone/else", "default", "text", "0"),
        )
        answer, no_column, unknown = ask(hub, tmp_path, *questions).splitlines()
        revision, documents = json.loads(answer)
        assert revision == "c" * 40
        assert sorted(documents) == ["train", "valid"]
        together = sorted(int(id.split(":")[1]) for part in documents.values() for id, _ in part)
        assert together == list(range(200))
        assert all(text == f"text {id.split(':')[1]}" for part in documents.values() for id, text in part)
        assert "no column 'text'; it has id, content" in no_column
        assert unknown.startswith("someone/else (default): not on the hub, or not open to you (404 Client Error.")
        assert unknown.endswith("check the id, the revision and your token")


def test_a_page_in_place_of_an_answer_may_pass_and_is_no_missing_configuration(tmp_path):
    """A proxy's; also in place of a file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), buffer)
    files = {"data/train-00000-of-00001.parquet": buffer.getvalue()}
    with HubServer("someone/text", "c" * 40, files) as hub, Answers(behind=hub.url) as server:
        with server.answering("a page", 1, "/api/"):
            assert json.loads(ask(server, tmp_path, "someone/text", "default", "text", "0"))[1]["train"]
        for meant in ("/api/", "/resolve/.*parquet"):
            hub.repository = f"someone/text{len(meant)}"
            with server.answering("a page", 1e9, meant):
                said = ask(server, tmp_path, hub.repository, "default", "text", "0")
            assert "the hub could not be read in 4 attempts" in said
            assert said.count("\n") == 1


def test_a_hub_that_never_answers_is_not_waited_for_for_ever(tmp_path):
    program = HUB_PROGRAM.replace("RETRY_SECONDS = (0, 0, 0)", "RETRY_SECONDS, hub.TIMEOUT_SECONDS = (0, 0, 0), 0.3")
    with Answers({"api/datasets/someone/text": b"{}"}) as server, server.answering("stalls", 1e9):
        said = ask(server, tmp_path, "someone/text", "default", "text", "0", program=program)
    assert "the hub could not be read in 4 attempts" in said
    assert "ReadTimeout" in said


def test_words_replaced_are_said_and_the_raw_text_named():
    source = HubSource(HubSettings("Salesforce/wikitext", "wikitext-103-v1"))
    assert source.notes == [
        "Salesforce/wikitext (wikitext-103-v1): rare words are replaced by <unk> in it; "
        "--config wikitext-103-raw-v1 is the whole text"
    ]
    assert HubSource(HubSettings("Salesforce/wikitext", "wikitext-103-raw-v1")).notes == []


def test_an_old_id_is_the_one_that_the_hub_answers_with(tmp_path):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), buffer)
    with HubServer("someone/text", "c" * 40, {"data/train-00000-of-00001.parquet": buffer.getvalue()}) as hub:
        hub.moved["text"] = "someone/text"
        assert json.loads(ask(hub, tmp_path, "text", "default", "text", "0")) == [
            "c" * 40,
            {"train": [["train:0", "a"]]},
        ]


def test_offline_is_one_line_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with HubServer("someone/text", "c" * 40, {}) as hub:
        said = ask(hub, tmp_path, "someone/text", "default", "text", "0")
    assert said == "someone/text (default): HF_HUB_OFFLINE is set, so the hub is not asked; unset it\n"
    assert hub.requests == []

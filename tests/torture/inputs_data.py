"""Odd files and faulty servers, against one rule: the right documents, or one plain line a problem.

A case is right if the preparation ends with exactly the expected documents in a dataset that verifies, or with a
`UserError` whose every line names what is wrong and what to do, and no manifest. Anything else breaks the rule: another
exception, other text, a dataset after an error, a wait beyond `LIMIT_SECONDS`, a process or a file in /dev/shm left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet

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
from tests.data_prep.faulty_servers import FAULTS, HARMLESS, PASSING, Answers, http_server, s3_server
from tests.data_prep.hub_server import HubServer
from tests.data_prep.odd_files import Case, Documents, file_cases, parquet

LIMIT_SECONDS = 60
READERS = ["jsonl", "txt", "parquet", "verify", "train"]


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

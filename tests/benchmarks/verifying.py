"""A gigabyte of shards: verified whole, and hashed as at a start, over plain reading on as many threads."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.encode import Encoded
from data_prep.engines import OrderedMap
from data_prep.manifest import check_shards, open_dataset
from data_prep.packing import Position
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.documents import Task, read_documents
from data_prep.sources.sample import SampleArticles
from data_prep.threads import in_threads
from data_prep.tokenizers.tokenizer import TokenizerSettings, train_tokenizer
from data_prep.verify import verify_dataset
from tests.benchmarks.disk import files, forget, read
from tests.benchmarks.turns import over, spread

GIGABYTES = 1.0
SAMPLE_BYTES = 1.5e6
"""Of the sample's tokens, all splits."""
TURNS = 5


def measure(folder: Path, gigabytes: float = GIGABYTES) -> dict[str, Any]:
    """Every turn reads from the disk."""
    write(folder, gigabytes)
    dataset = open_dataset(folder)
    report = verify_dataset(folder)
    assert not report.problems, report.problems[:3]
    contenders: dict[str, Callable[[], Any]] = {
        "plain": lambda: list(in_threads(read, files(folder))),
        "verify": lambda: verify_dataset(folder),
        "hashes_at_the_start": lambda: [
            check_shards(dataset, name, range(index.num_shards), hashes=True) for name, index in dataset.indexes.items()
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, contender in contenders.items():
            forget(folder)
            begin = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - begin)
    plain, size = seconds.pop("plain"), sum(path.stat().st_size for path in files(folder))
    figures = {name: over(turns, plain) for name, turns in seconds.items()}
    by_turns = {f"{name}_by_turns": spread(turns, plain) for name, turns in seconds.items()}
    return {"gigabytes": size / 1e9, "gigabytes_per_second": size / 1e9 / min(plain), **figures, **by_turns}


def write(folder: Path, gigabytes: float) -> None:
    """The sample, prepared with a real tokenizer, as if it stood there many times."""
    source = SampleArticles()
    texts = (document.text for document in read_documents(source, "train"))
    tokenizer = train_tokenizer(texts, TokenizerSettings(16_384))
    prepare(PrepareSettings(source, tokenizer, folder, engine=Repeating(round(gigabytes * 1e9 / SAMPLE_BYTES))))


@dataclass(frozen=True)
class Repeating:
    """An engine that encodes each task once, and gives the result `times` times."""

    times: int

    def begin(self) -> None: ...

    @contextmanager
    def start(self, function: Callable[[Task], Encoded]) -> Iterator[OrderedMap]:
        def repeated(tasks: Iterable[Task]) -> Iterator[Encoded]:
            for task in tasks:
                encoded = function(task)
                unit, part = encoded.position
                for number in range(self.times):
                    yield replace(encoded, position=Position(unit, part * self.times + number))

        yield repeated

"""What a run reads: one dataset, or a mixture of several with weights, in folders or behind URLs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data_prep.errors import UserError
from data_prep.manifest import Dataset, TokenizerInfo, canonical_json, check_shards
from pipeline.data.mixture import MixtureSource, mixture_order
from pipeline.data.remote import RemoteDataset, open_location
from pipeline.data.samples import SampleSource
from pipeline.settings.sections import DEFAULT_CACHE_FOLDER, DataSection, MixturePart


@dataclass(frozen=True)
class Part:
    """One dataset of a corpus.

    Attributes:
        location: the folder or URL, as the run file has it.
        name: short and unlike those of the other parts; metrics carry it.
        dataset: opened.
        share: of the samples read, so that the shares of all parts sum to 1.
    """

    location: str
    name: str
    dataset: Dataset
    share: Fraction

    @property
    def is_remote(self) -> bool:
        return isinstance(self.dataset, RemoteDataset)


@dataclass(frozen=True)
class Corpus:
    """The opened datasets of a run; all have one tokenizer."""

    parts: tuple[Part, ...]

    @property
    def dataset_id(self) -> str:
        """Hex sha256 that names what is read: the dataset's own, or that of all ids and shares of a mixture."""
        if len(self.parts) == 1:
            return self.parts[0].dataset.dataset_id
        content = [[part.dataset.dataset_id, str(part.share)] for part in self.parts]
        return hashlib.sha256(canonical_json({"mixture": content})).hexdigest()

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.parts[0].dataset.manifest.tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        return self.parts[0].dataset.tokenizer_folder

    def source(
        self, split: str, sequence_length: int, seed: int, window_tokens: int | None = None
    ) -> SampleSource | MixtureSource:
        """The samples of a split in order; the arguments, and what is raised, as of `SampleSource`."""
        sources = [SampleSource(part.dataset, split, sequence_length, seed, window_tokens) for part in self.parts]
        return sources[0] if len(sources) == 1 else MixtureSource(sources, [part.share for part in self.parts])

    def check_shards(
        self, splits: Sequence[str], rank: int, world_size: int, hashes: bool, before_shard: Callable[[], None]
    ) -> list[str]:
        """One line for every damaged shard in this rank's share of those that lie in folders.

        Shards behind a URL are hashed when they are downloaded, so nothing is asked of them here.
        """
        problems = []
        for part in self.parts:
            for name in splits if not part.is_remote else ():
                share = range(rank, part.dataset.split(name).num_shards, world_size)
                problems += check_shards(part.dataset, name, share, hashes, before_shard)
        return problems

    def describe(self, split: str) -> Iterator[str]:
        """One line for each dataset."""
        for part in self.parts:
            share = "" if len(self.parts) == 1 else f"{float(part.share):.4g} of the samples from "
            tokens = part.dataset.split(split).tokens
            yield f"{share}{part.location}, {tokens:,} tokens, dataset_id {part.dataset.dataset_id[:12]}"


def open_corpus(data: DataSection) -> Corpus:
    """Opens every dataset that `data.dataset` names.

    Raises UserError, with the problems of all of them: as `open_location`; a dataset given twice; tokenizers that
    differ; weights that cannot be.
    """
    entries = [MixturePart(dataset=data.dataset, weight=1)] if isinstance(data.dataset, str) else data.dataset
    problems: list[str] = []
    datasets: list[Dataset] = []
    for entry in entries:
        try:
            datasets.append(open_location(entry.dataset, data.cache_dir or DEFAULT_CACHE_FOLDER, data.cache_bytes))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    _check_together([entry.dataset for entry in entries], datasets)
    counts = mixture_order([entry.weight for entry in entries]).counts.tolist()
    names = _names([entry.dataset for entry in entries])
    return Corpus(
        tuple(
            Part(entry.dataset, name, dataset, Fraction(count, sum(counts)))
            for entry, name, dataset, count in zip(entries, names, datasets, counts, strict=True)
        )
    )


def _check_together(locations: Sequence[str], datasets: Sequence[Dataset]) -> None:
    """Raises UserError for a dataset that stands twice in a mixture, and for one of another tokenizer."""
    problems = []
    first_tokenizer = datasets[0].manifest.tokenizer.sha256
    seen: dict[str, str] = {}
    for location, dataset in zip(locations, datasets, strict=True):
        if (other := seen.setdefault(dataset.dataset_id, location)) is not location:
            problems.append(f"{location}: the same dataset as {other}; name it once, with the sum of the weights")
        tokenizer = dataset.manifest.tokenizer.sha256
        if tokenizer != first_tokenizer:
            problems.append(
                f"{location}: its tokenizer is {tokenizer[:16]}…, that of {locations[0]} is {first_tokenizer[:16]}…; "
                "prepare both with one tokenizer"
            )
    if problems:
        raise UserError([f"data.dataset: {problem}" for problem in problems])


def _names(locations: Sequence[str]) -> list[str]:
    """The last part of each location; numbered where several are alike."""
    last = [location.rstrip("/").rsplit("/", 1)[-1] for location in locations]
    count = Counter(last)
    return [name if count[name] == 1 else f"{name}-{number}" for number, name in enumerate(last, start=1)]

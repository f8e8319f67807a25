"""A dataset on one HTML page: counts, plots, examples. One file, nothing to fetch."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.html import render
from data_prep.manifest import Dataset, Manifest, SplitIndex
from data_prep.report import document_lengths, read_tokens
from data_prep.store import explained_write_errors, publish_file
from data_prep.tokenizers.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer
from data_prep.verify import read_chunk

EXAMPLES = 3  # documents shown of each split: the first, the middle, the last
EXAMPLE_TOKENS = 120
MEASURED_DOCUMENTS = 2000  # at most, evenly spread: for bytes per token
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """A piece of text as a reader sees it, and the ids it is made of: several where a character is spelled in bytes."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """The beginning of a document."""

    number: int
    length: int
    tokens: list[Token]


@dataclass(frozen=True)
class Plot:
    title: str
    svg: Markup


@dataclass(frozen=True)
class Split:
    """The part of the page about one split."""

    name: str
    plots: list[Plot]
    examples: list[Example]


def write_page(dataset: Dataset, path: Path) -> None:
    """Writes the page of a dataset to `path`."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    manifest = dataset.manifest
    splits = [_split(dataset, name, index, tokenizer) for name, index in dataset.indexes.items()]
    page = render(
        "dataset.html.jinja",
        title=f"{manifest.source.name}: {sum(info.tokens for info in manifest.splits.values()):,} tokens",
        sections=[("summary", "Summary"), *((f"split-{split.name}", split.name) for split in splits)],
        dataset=dataset,
        manifest=manifest,
        notes=_notes(manifest),
        splits=splits,
    )
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_file(path, page.encode())


def _notes(manifest: Manifest) -> list[str]:
    return [
        f"{name}: {count:,} {kind}: {reason}"
        for name, info in manifest.splits.items()
        for kind, counts in (("documents dropped", info.dropped), ("characters changed", info.changed))
        for reason, count in counts.items()
    ]


def _split(dataset: Dataset, name: str, index: SplitIndex, tokenizer: Tokenizer) -> Split:
    lengths = document_lengths(dataset, index)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    examples = []
    for number in sorted({0, len(lengths) // 2, len(lengths) - 1})[:EXAMPLES]:
        begin, length = int(starts[number]), int(lengths[number])
        ids = read_tokens(dataset, index, begin, begin + min(length + 1, EXAMPLE_TOKENS)).tolist()
        examples.append(Example(number, length, list(readable_tokens(tokenizer, ids))))
    return Split(name, _plots(dataset, index, tokenizer, starts, lengths), examples)


def readable_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[Token]:
    """Ids as a reader sees them: bytes that spell one character are one token; special pieces stand by their name."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    spelled: list[int] = []
    for id in ids:
        piece = tokenizer.processor.id_to_piece(id)
        if match := BYTE_PIECE.fullmatch(piece):
            spelled.append(id)
            if text := decoder.decode(bytes([int(match[1], 16)])):
                yield Token(text.replace("\n", "↵\n"), tuple(spelled))
                spelled = []
            continue
        if spelled:  # a character that was never finished
            yield Token(decoder.decode(b"", final=True), tuple(spelled))
            spelled = []
        yield Token(piece.replace(SPACE_MARK, " "), (id,))
    if spelled:
        yield Token(decoder.decode(b"", final=True), tuple(spelled))


def _plots(
    dataset: Dataset, index: SplitIndex, tokenizer: Tokenizer, starts: np.ndarray, lengths: np.ndarray
) -> list[Plot]:
    """Lengths of documents, bytes per token, and how often each piece is used."""
    figure, axes = _figure()
    edges = np.unique(np.geomspace(1, max(int(lengths.max()), 2) + 1, 30).astype(int))
    axes.hist(np.maximum(lengths, 1), bins=edges.tolist(), color="#3b7dd8")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents")
    plots = [_plot("Length of documents", figure)]

    figure, axes = _figure()
    chosen = np.unique(np.linspace(0, len(lengths) - 1, MEASURED_DOCUMENTS).astype(int))
    ratios = []
    for number in chosen[lengths[chosen] > 0]:
        begin = int(starts[number])
        tokens = read_tokens(dataset, index, begin, begin + int(lengths[number]))
        ratios.append(len(tokenizer.decode(tokens).encode()) / len(tokens))
    axes.hist(ratios, bins=30, color="#2a9d6f")
    axes.set(xlabel="bytes per token", ylabel="documents")
    plots.append(_plot("Compression", figure))

    figure, axes = _figure()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for chunk in range(len(index.chunk_shard)):
        counts += np.bincount(read_chunk(dataset, index, chunk), minlength=tokenizer.vocab_size)
    used = np.sort(counts[counts > 0])[::-1]
    axes.loglog(np.arange(1, len(used) + 1), used, color="#e0712f")
    axes.set(xlabel="pieces by rank", ylabel="uses")
    unused = tokenizer.vocab_size - len(used)
    return [*plots, _plot(f"Pieces in use ({unused:,} unused)", figure)]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 2.9), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a document
    return figure, axes


def _plot(title: str, figure: Figure) -> Plot:
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue().decode()
    return Plot(title, Markup(text[text.index("<svg") :]))

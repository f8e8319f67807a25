"""A description of a dataset: its text, its tokens, how long its documents are, how well it compresses."""

from __future__ import annotations

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Dataset, SplitIndex
from data_prep.tokenizers.tokenizer import load_tokenizer
from data_prep.verify import read_chunk, summary

SHOWN_TOKENS = 2048


def document_lengths(dataset: Dataset, index: SplitIndex) -> np.ndarray:
    """[documents] int64: tokens of each document of a split, without eos."""
    eos = dataset.manifest.tokenizer.eos_token_id
    ends = [
        np.flatnonzero(read_chunk(dataset, index, chunk) == eos) + int(index.token_start[chunk])
        for chunk in range(len(index.chunk_shard))
    ]
    return np.diff(np.concatenate([[-1], *ends])) - 1


def read_tokens(dataset: Dataset, index: SplitIndex, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) of a split's stream."""
    first = int(np.searchsorted(index.token_start, start, "right")) - 1
    last = int(np.searchsorted(index.token_start, stop, "left"))
    parts = []
    for chunk in range(first, last):
        begin, end = int(index.token_start[chunk]), int(index.token_start[chunk + 1])
        parts.append(read_chunk(dataset, index, chunk, max(start - begin, 0), min(stop, end) - begin))
    return np.concatenate(parts)


def describe(dataset: Dataset, split: str) -> list[str]:
    """Counts, compression, and a histogram of document lengths."""
    index = dataset.split(split)
    lengths = document_lengths(dataset, index)
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).astype(int)
    lines = summary(dataset.manifest)
    lines.append("")
    lines.append(f"{split}: tokens per document: least, quartiles, most: " + ", ".join(f"{q:,}" for q in quantiles))
    edges = 2 ** np.arange(0, int(lengths.max()).bit_length() + 1)
    counts = np.histogram(lengths, np.concatenate([[0], edges]))[0]
    width = max(int(counts.max()), 1)
    for low, high, count in zip(np.concatenate([[0], edges[:-1]]), edges, counts, strict=True):
        if count:
            lines.append(f"{low:>10,} – {high - 1:<10,} {count:>10,} " + "█" * max(1, round(40 * count / width)))
    return lines


def show_document(dataset: Dataset, split: str, number: int) -> list[str]:
    """A document's id, text and tokens. Raises UserError beyond the last one."""
    index = dataset.split(split)
    total = dataset.manifest.splits[split].documents
    if not 0 <= number < total:
        raise UserError(f"document is {number}; split '{split}' has documents 0 to {total - 1:,}")
    start, stop = (_document_start(dataset, index, place) for place in (number, number + 1))
    return _show(dataset, index, start, stop, f"{split} document {number}")


def _document_start(dataset: Dataset, index: SplitIndex, number: int) -> int:
    """The token at which a document starts; beyond the last one, the end of the stream. Reads one chunk."""
    if number == int(index.document_start[-1]):
        return index.tokens
    chunk = int(np.searchsorted(index.document_start, number, "right")) - 1
    tokens = read_chunk(dataset, index, chunk)
    starts = np.flatnonzero(tokens[:-1] == dataset.manifest.tokenizer.eos_token_id) + 1
    if len(starts) < int(index.document_start[chunk + 1] - index.document_start[chunk]):
        starts = np.concatenate([[0], starts])  # the chunk begins with a document
    return int(index.token_start[chunk]) + int(starts[number - int(index.document_start[chunk])])


def show_sample(dataset: Dataset, split: str, number: int, sequence_length: int) -> list[str]:
    """A training sample's text and tokens, the last target included."""
    index = dataset.split(split)
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}; it must be 1 or more")
    total = max((index.tokens - 1) // sequence_length, 0)
    if total == 0:
        raise UserError(
            f"split '{split}' has {index.tokens:,} tokens, too few for a sample of {sequence_length:,}; ask for a "
            "shorter --sequence-length"
        )
    if not 0 <= number < total:
        raise UserError(
            f"sample is {number}; split '{split}' has samples 0 to {total - 1:,} of {sequence_length} tokens"
        )
    start = number * sequence_length
    return _show(dataset, index, start, start + sequence_length + 1, f"{split} sample {number}")


def _show(dataset: Dataset, index: SplitIndex, start: int, stop: int, title: str) -> list[str]:
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    tokens = read_tokens(dataset, index, start, stop)
    text = tokenizer.decode(tokens)
    shown = tokens[:SHOWN_TOKENS].tolist()
    pieces = " ".join(f"{tokenizer.processor.id_to_piece(id)}:{id}" for id in shown)
    more = f" … and {len(tokens) - len(shown):,} more" if len(tokens) > len(shown) else ""
    size = len(text.encode())
    return [
        f"{title}: tokens {start:,} to {stop - 1:,} of the stream, {len(tokens):,} tokens, {size:,} bytes "
        f"({size / len(tokens):.2f} bytes per token)",
        "",
        tokenizer.decode(shown) + more,
        "",
        pieces + more,
    ]

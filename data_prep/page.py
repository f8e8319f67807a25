"""A dataset on one HTML page: counts, plots, examples. One file, nothing to fetch."""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data_prep.manifest import Dataset, SplitIndex
from data_prep.report import document_lengths, read_chunk, read_tokens
from data_prep.store import explained_write_errors, publish_file
from data_prep.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer

EXAMPLES = 3  # documents shown of each split: the first, the middle, the last
EXAMPLE_TOKENS = 120
MEASURED_DOCUMENTS = 2000  # at most, evenly spread: for bytes per token
COLORS = ("#dbeafe", "#fef3c7", "#dcfce7", "#fae8ff")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid #e5e7eb }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 1px 0 }
code { font-size: 14px; overflow-wrap: anywhere }
"""


def write_page(dataset: Dataset, path: Path) -> None:
    """Writes the page of a dataset to `path`."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    parts = [_counts(dataset)]
    for split, index in dataset.indexes.items():
        lengths = document_lengths(dataset, index)
        starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
        parts.append(f"<h2>{html.escape(split)}</h2>")
        parts.append(_plots(dataset, index, tokenizer, starts, lengths))
        for number in sorted({0, len(lengths) // 2, len(lengths) - 1})[:EXAMPLES]:
            begin = int(starts[number])
            tokens = read_tokens(dataset, index, begin, begin + min(int(lengths[number]) + 1, EXAMPLE_TOKENS))
            parts.append(f"<h3>document {number:,}: {int(lengths[number]):,} tokens</h3>")
            parts.append(_example(tokenizer, tokens))
    title = f"dataset {dataset.dataset_id[:16]}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1>{''.join(parts)}</html>\n"
    )
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_file(path, page.encode())


def _counts(dataset: Dataset) -> str:
    manifest = dataset.manifest
    columns = ("documents", "tokens", "source_bytes", "words", "shards")
    rows = [
        "<tr><th>split</th>"
        + "".join(f"<th>{c.replace('_', ' ')}</th>" for c in columns)
        + "<th>bytes a token</th></tr>"
    ]
    for name, info in manifest.splits.items():
        cells = "".join(f"<td>{getattr(info, column):,}</td>" for column in columns)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{info.source_bytes / info.tokens:.3f}</td></tr>")
    notes = [
        f"{name}: {count:,} {kind}: {reason}"
        for name, info in manifest.splits.items()
        for kind, counts in (("documents dropped", info.dropped), ("characters changed", info.changed))
        for reason, count in counts.items()
    ]
    tokenizer = manifest.tokenizer
    facts = [
        f"source: {manifest.source.name}, <code>{html.escape(str(manifest.source.settings))}</code>",
        f"tokenizer: {tokenizer.model_type}, {tokenizer.vocab_size:,} pieces, "
        f"sha256 <code>{tokenizer.sha256[:16]}</code>",
        f"format {manifest.format_version}, chunks of {manifest.chunk_tokens:,} tokens, "
        f"{manifest.chunks_per_shard} a shard",
        *map(html.escape, notes),
    ]
    return f"<table>{''.join(rows)}</table><ul>{''.join(f'<li>{fact}</li>' for fact in facts)}</ul>"


def _plots(dataset: Dataset, index: SplitIndex, tokenizer: Tokenizer, starts: np.ndarray, lengths: np.ndarray) -> str:
    """Lengths of documents, bytes per token, and how often each piece is used."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    length_axes, ratio_axes, piece_axes = figure.subplots(1, 3)
    edges = np.unique(np.geomspace(1, max(int(lengths.max()), 2) + 1, 30).astype(int))
    length_axes.hist(np.maximum(lengths, 1), bins=edges, color="#2563eb")
    length_axes.set(xscale="log", xlabel="tokens a document", ylabel="documents", title="Length of documents")

    chosen = np.unique(np.linspace(0, len(lengths) - 1, MEASURED_DOCUMENTS).astype(int))
    ratios = []
    for number in chosen[lengths[chosen] > 0]:
        begin = int(starts[number])
        tokens = read_tokens(dataset, index, begin, begin + int(lengths[number]))
        ratios.append(len(tokenizer.decode(tokens).encode()) / len(tokens))
    ratio_axes.hist(ratios, bins=30, color="#16a34a")
    ratio_axes.set(xlabel="bytes a token", ylabel="documents", title="Compression")

    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for chunk in range(len(index.chunk_shard)):
        counts += np.bincount(read_chunk(dataset, index, chunk), minlength=tokenizer.vocab_size)
    used = np.sort(counts[counts > 0])[::-1]
    piece_axes.loglog(np.arange(1, len(used) + 1), used, color="#d97706")
    unused = tokenizer.vocab_size - len(used)
    piece_axes.set(xlabel="pieces by rank", ylabel="uses", title=f"Use of the vocabulary ({unused:,} unused)")
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue().decode()
    return text[text.index("<svg") :]


def _example(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text with each token on a ground of its own; bytes and special pieces by name."""
    spans = []
    for number, id in enumerate(tokens.tolist()):
        piece = tokenizer.processor.id_to_piece(id)
        shown = html.escape("↵\n" if piece == "<0x0A>" else piece.replace(SPACE_MARK, " "))
        color = COLORS[number % len(COLORS)]
        spans.append(f'<span style="background:{color}" title="{id}">{shown}</span>')
    return f'<div class="text">{"".join(spans)}</div>'

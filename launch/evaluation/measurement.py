"""One measurement of a model: what was read and how, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipeline.evaluation.by_position import Group
    from pipeline.evaluation.figures import Figures
    from pipeline.evaluation.measured import Measured

WIDTH = 200
"""Of tables that go elsewhere than to a terminal: nothing is cut."""


@dataclass(frozen=True)
class Reading:
    """How a split was cut into what the model saw at once.

    Attributes:
        stride: tokens from one window to the next; `sequence_length` where they lie side by side.
        max_samples: of each dataset, only the first so many windows.
    """

    split: str
    sequence_length: int
    stride: int
    max_samples: int | None

    @property
    def window(self) -> str:
        return "blocks" if self.stride == self.sequence_length else "sliding"

    @property
    def label(self) -> str:
        """Short, for names: blocks-256, sliding-256-64, blocks-256-first-8."""
        stride = "" if self.window == "blocks" else f"-{self.stride}"
        first = f"-first-{self.max_samples}" if self.max_samples else ""
        return f"{self.window}-{self.sequence_length}{stride}{first}"

    def __str__(self) -> str:
        if self.window == "blocks":
            how = f"blocks of {self.sequence_length:,} tokens side by side"
        else:
            how = f"a window of {self.sequence_length:,} tokens that slides by {self.stride:,}"
        first = f", the first {self.max_samples:,}" if self.max_samples else ""
        return f"split {self.split}, {how}{first}"

    def facts(self) -> dict[str, Any]:
        return {"split": self.split, "window": self.window} | {
            name: vars(self)[name] for name in ("sequence_length", "stride", "max_samples")
        }


@dataclass(frozen=True)
class Measurement:
    """A model's figures on some datasets.

    Attributes:
        model: the path that was given.
        step: of the checkpoint; None for an export.
        mixed: of a mixture, the figures of text mixed as in training.
    """

    model: str
    step: int | None
    reading: Reading
    datasets: Sequence[Measured]
    mixed: Figures | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "step": self.step,
            **self.reading.facts(),
            "datasets": [dataset_facts(item, self.mixed is not None) for item in self.datasets],
            "mixed": vars(self.mixed) if self.mixed else None,
            "seconds": round(self.seconds, 3),
        }

    def values(self) -> dict[str, float]:
        """Under names of metrics, which say how the text was read."""
        figures = {item.part.name: item.figures for item in self.datasets} | (
            {"mixed": self.mixed} if self.mixed else {}
        )
        return {
            f"evaluated/{name}/{self.reading.split}/{self.reading.label}/{figure}": float(value)
            for name, of_dataset in figures.items()
            for figure, value in vars(of_dataset).items()
            if figure != "tokens"
        }

    def rows(self) -> list[dict[str, Any]]:
        """Of a table in MLflow."""
        how = {"step": self.step, **self.reading.facts()}
        facts = [dataset_facts(item, self.mixed is not None) for item in self.datasets]
        places = ("by_position", "by_history")
        return [how | {name: value for name, value in row.items() if name not in places} for row in facts]

    table, key = "evaluations.json", ("step", "dataset_id", "split", "sequence_length", "stride", "max_samples")

    def show(self, console: Console) -> None:
        step = "" if self.step is None else f", step {self.step:,}"
        console.print(f"{self.model}{step}: {self.reading}", soft_wrap=True, highlight=False)
        for item in self.datasets:
            place = f"{item.part.name}: {item.part.location}, dataset_id {item.part.dataset.dataset_id[:12]}"
            console.print(place, soft_wrap=True, highlight=False)
        console.print()
        console.print(self._figures())
        estimated = " Words and bytes of a part of the split are the split's own per token."
        console.print(
            "Loss in nats per token. Perplexity per word (and line end) and bits per byte compare across tokenizers."
            + (estimated if any(item.estimated for item in self.datasets) else ""),
            style="dim",
            highlight=False,
        )
        for item in self.datasets:
            if item.by_position:
                console.print()
                console.print(_groups(item.part.name, "position in the window", item.by_position.positions()))
                console.print()
                console.print(_groups(item.part.name, "before it in the window", item.by_position.histories()))

    def _figures(self) -> Table:
        heads = ("loss", "perplexity\nper token", "tokens", "perplexity\nper word", "words and\nline ends")
        table = plain_table("dataset", *heads, "bits\nper byte", "bytes")
        for item in self.datasets:
            about = "≈" if item.estimated else ""
            counts = (f"{about}{item.words:,}", f"{about}{item.source_bytes:,}")
            table.add_row(item.part.name, *_row(item.figures, counts))
        if self.mixed:
            shares = " + ".join(f"{float(item.part.share):.3g} {item.part.name}" for item in self.datasets)
            table.add_row(f"mixed ({shares})", *_row(self.mixed, ("", "")))
        return table


def dataset_facts(item: Measured, mixture: bool) -> dict[str, Any]:
    """What is known of one dataset, as JSON has it."""
    facts: dict[str, Any] = {
        "name": item.part.name,
        "location": item.part.location,
        "dataset_id": item.part.dataset.dataset_id,
        "share": float(item.part.share) if mixture else None,
        **vars(item.figures),
        "tokens": int(item.figures.tokens),
        "words_and_line_ends": item.words,
        "bytes": item.source_bytes,
        "words_and_bytes_estimated": item.estimated,
    }
    if item.by_position:
        facts["by_position"] = [vars(group) for group in item.by_position.positions()]
        facts["by_history"] = [vars(group) for group in item.by_position.histories()]
    return facts


def plain_table(first: str, *heads: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _row(figures: Figures, counts: tuple[str, str]) -> list[str]:
    """As the heads of the table: each figure in front of its denominator."""
    return [
        f"{figures.loss:.4f}",
        _short(figures.token_perplexity),
        f"{figures.tokens:,.0f}",
        _short(figures.word_perplexity),
        counts[0],
        f"{figures.bits_per_byte:.4f}",
        counts[1],
    ]


def _groups(dataset: str, what: str, groups: Sequence[Group]) -> Table:
    total = sum(group.targets for group in groups)
    table = plain_table(what, f"loss\n{dataset}", "tokens", "share")
    for group in groups:
        loss = f"{group.loss:.4f}" if group.targets else "–"
        table.add_row(group.name, loss, f"{group.targets:,}", f"{group.targets / total:.1%}")
    return table


def _short(value: float) -> str:
    if math.isnan(value):
        return "–"  # there is nothing to divide by
    return f"{value:,.2f}" if math.isfinite(value) and value < 1e6 else f"{value:.3g}"

"""The loss by position and by what stood before, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.evaluation.measured import Measured

KINDS = ("png", "svg", "pdf")


def draw(datasets: Sequence[Measured], title: str, kind: str) -> bytes:
    """One curve and one group of bars for each dataset that was measured by position.

    Args:
        kind: of `KINDS`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    curve, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    places = [(item.part.name, item.by_position) for item in datasets if item.by_position]
    for number, (name, place) in enumerate(places):
        positions, histories = place.positions(), place.histories()
        middles = [_middle(group.name) for group in positions]
        curve.plot(middles, [group.loss for group in positions], marker="o", label=name)
        width = 0.8 / len(places)
        spots = [spot + number * width for spot in range(len(histories))]
        drawn = bars.bar(spots, [group.loss for group in histories], width, label=name)
        bars.bar_label(drawn, [f"{group.loss:.2f}" for group in histories], fontsize=8)
        bars.set_xticks(
            [spot + 0.4 - width / 2 for spot in range(len(histories))],
            [group.name.replace(" ", "\n") for group in histories],
        )
    curve.set_xscale("log", base=2)
    curve.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    curve.set_xlabel("tokens before the target in its window")
    curve.set_ylabel("loss, nats per token")
    curve.grid(alpha=0.3)
    bars.set_title("by what stood before in the window", fontsize=9)
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
    if len(places) > 1:
        curve.legend()
    content = BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()


def kind_of(path: Path) -> str | None:
    """By the ending of the name; None where nothing can be drawn so."""
    ending = path.suffix.lower().removeprefix(".")
    return ending if ending in KINDS else None


def _middle(name: str) -> float:
    """Of a group of positions, 8-15, in tokens before the target: one more than the position."""
    first, _, last = name.partition("-")
    return (int(first) + int(last or first)) / 2 + 1

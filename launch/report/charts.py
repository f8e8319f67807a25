"""Runs → charts, as plotly takes them. Pure: the page's script only chooses the axis and smooths."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import plotly.graph_objects as go

from launch.report.run import Run, label_of

COLORS = ("#3b7dd8", "#e0712f", "#2a9d6f", "#b45ec4", "#c39a1c", "#d6486f", "#3fa3bf", "#8d7057")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
RESTART, ROLL_BACK, SAVE = "#c98a1b", "#d23f34", "#8a94a3"
FEW_POINTS = 25
MOST_LARGE_MARKS = 60
SPIKE = {"spikethickness": 1, "spikedash": "dot", "spikecolor": SAVE}
UNDRAWN = (
    "time/step_seconds",
    *("system/*memory_usage_percentage", "system/*power_usage_percentage"),
    *("system/*disk_usage_megabytes", "system/*disk_available_megabytes"),
)
"""Metrics that say what others say: patterns."""
LABELS = {"loss/train": "training", "loss/valid": "held-out"}
MOST_POINTS = 2000
"""Of one curve: a longer one is thinned, its highs and lows kept."""


@dataclass(frozen=True)
class Chart:
    """A chart that a page has where a run knows one of its metrics.

    Attributes:
        metrics: names or patterns, in order of drawing.
        marked: with restarts, roll backs and saves.
        stacked: parts of a whole.
        band: the metrics are a minimum, a mean and a maximum.
        smooth: the page's smoothing applies.
        from_zero: the axis begins at 0, so that heights compare.
    """

    section: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    wide: bool = False
    marked: bool = False
    stacked: bool = False
    band: bool = False
    smooth: bool = True
    from_zero: bool = False

    def names(self, known: Sequence[str]) -> list[str]:
        found = [name for pattern in self.metrics for name in known if fnmatchcase(name, pattern)]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Drawn:
    """A chart with its data: `figure` is JSON for plotly."""

    title: str
    unit: str
    wide: bool
    figure: str


def draw(charts: Sequence[Chart], runs: Sequence[Run]) -> dict[str, list[Drawn]]:
    """Section → its charts that have data; metrics that no chart names come last, one chart for each group."""
    known = sorted({name for run in runs for name in run.metrics})
    taken = {name for chart in charts for name in chart.names(known)}
    taken |= {name for name in known if any(fnmatchcase(name, pattern) for pattern in UNDRAWN)}
    groups: dict[str, list[str]] = {}
    for name in known:
        if name not in taken:
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    rest = [Chart("more", group, "", tuple(names)) for group, names in groups.items()]
    drawn: dict[str, list[Drawn]] = {}
    for chart in [*charts, *rest]:
        names = chart.names(known)
        longest = max((len(run.curve(name)) for run in runs for name in names), default=0)
        if longest > 1 or (longest and chart.wide):  # one point alone is no curve; tables have it
            made = _bars(chart, runs, names) if chart.stacked and len(runs) > 1 else _lines(chart, runs, names)
            drawn.setdefault(chart.section, []).append(
                Drawn(chart.title, chart.unit, chart.wide, str(made.to_json(remove_uids=True)))
            )
    return drawn


def _lines(chart: Chart, runs: Sequence[Run], names: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    for number, run in enumerate(runs):
        for place, name in enumerate(names):
            curve = run.curve(name)
            if not curve:
                continue
            if chart.band and len(runs) > 1 and not name.endswith("_mean"):
                continue
            label = _label(name, names)
            if len(runs) > 1:
                own = html.escape(label_of(run, runs))
                label = own if len(names) == 1 else f"{own} · {label}"
            color = COLORS[(number if len(runs) > 1 or chart.band else place) % len(COLORS)]
            x, y = thin(curve)
            figure.add_scatter(
                x=x,
                y=y,
                name=label,
                mode="lines+markers" if len(x) <= FEW_POINTS and not (chart.stacked or chart.band) else "lines",
                line={"color": color, **_line(chart, name, place, len(runs) > 1)},
                fill="tonexty" if chart.band and name.endswith("_max") and len(runs) == 1 else None,
                fillcolor="rgba(59,125,216,0.15)" if chart.band else None,
                marker={"size": 5},
                stackgroup="parts" if chart.stacked else None,
                hovertemplate="%{y:.5~g}",
                meta={
                    "run": number,
                    "smooth": chart.smooth and not chart.stacked and not name.startswith("loss/valid"),
                },
            )
        if chart.marked:
            _add_marks(figure, run, number, names)
    lines = sum(not (trace.meta or {}).get("mark") for trace in figure.data)
    _lay_out(figure, chart, legend=(lines > 1 or chart.marked) and not (chart.band and len(runs) == 1))
    return figure


def _line(chart: Chart, name: str, place: int, several: bool) -> dict[str, Any]:
    """Width and dashes: of several runs a metric has its own dashes; the edges of a band are thin."""
    if chart.band:
        return {"width": 1.8 if name.endswith("_mean") else 0.5, "dash": "solid"}
    return {"width": 1.8, "dash": DASHES[place % len(DASHES)] if several else "solid"}


def _add_marks(figure: go.Figure, run: Run, number: int, names: Sequence[str]) -> None:
    """Restarts and roll backs as lines, saves as small triangles, what was gone back from as faint points."""
    shown = {trace.legendgroup for trace in figure.data}
    undone = [(point.step, point.metrics[names[0]]) for point in run.undone if names[0] in point.metrics]
    if undone:
        x, y = thin(undone)
        figure.add_scatter(
            x=x,
            y=y,
            name="taken again",
            legendgroup="taken again",
            showlegend="taken again" not in shown,
            hovertemplate="%{y:.5~g}",
            mode="markers",
            marker={"size": 4, "color": SAVE, "symbol": "x-thin-open"},
            meta={"run": number, "smooth": False},
        )
    for kind, color, found in (
        ("restart", RESTART, restarts(run)),
        ("roll back", ROLL_BACK, roll_backs(run)),
        ("save", SAVE, saves(run)),
    ):
        if not found:
            continue
        is_save = kind == "save"
        figure.add_scatter(
            x=[value for step, _ in found for value in ((step,) if is_save else (step, step, None))],
            y=[value for _ in found for value in ((0.0,) if is_save else (0.0, 1.0, None))],
            text=[value for _, said in found for value in ((said,) if is_save else (said, said, ""))],
            name=kind,
            legendgroup=kind,
            showlegend=kind not in shown,
            mode="markers" if is_save else "lines",
            marker={"size": 7 if len(found) <= MOST_LARGE_MARKS else 3, "symbol": "triangle-up", "color": color},
            line={"color": color, "width": 1.3, "dash": "dot"},
            hovertemplate="%{text}<extra></extra>",
            yaxis="y2",
            cliponaxis=False,
            meta={"run": number, "smooth": False, "mark": True},
        )


def restarts(run: Run) -> list[tuple[int, str]]:
    """Steps from which the run was started again, each with its cause."""
    found = []
    for start in run.starts[1:]:
        ends = [end for end in run.ends if end.time_unix_seconds <= start.time_unix_seconds]
        why = f" after: {ends[-1].cause}" if ends else ""
        found.append((start.step, html.escape(f"started again at step {start.step:,}{why}"[:160])))
    return found


def roll_backs(run: Run) -> list[tuple[int, str]]:
    return [
        (int(item["step"]), f"spike at step {item['step']:,}, back to {item['to_step']:,}") for item in run.roll_backs
    ]


def saves(run: Run) -> list[tuple[int, str]]:
    saved = {event.step: f"saved step {event.step:,}" for event in run.events if event.kind == "saved"}
    standing = {item.step: f"saved step {item.step:,}, which stands" for item in run.checkpoints}
    return sorted((saved | standing).items())


def _bars(chart: Chart, runs: Sequence[Run], names: Sequence[str]) -> go.Figure:
    """Means over each run, a bar for a run."""
    figure = go.Figure()
    for place, name in enumerate(names):
        values = [_mean([value for _, value in run.curve(name)]) for run in runs]
        figure.add_bar(
            y=[html.escape(label_of(run, runs)) for run in runs],
            x=values,
            orientation="h",
            name=_label(name, names),
            marker={"color": COLORS[place % len(COLORS)]},
            meta={"fixed": True},
        )
    _lay_out(figure, chart, legend=True)
    figure.update_layout(height=110 + 44 * len(runs))
    figure.update_layout(barmode="stack", hovermode="closest", yaxis={"title": None, "automargin": True})
    figure.update_layout(xaxis={"title": {"text": "seconds per step, mean over the run", "font": {"size": 12}}})
    return figure


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0


def thin(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float | None]]:
    """At most MOST_POINTS of a curve: of each stretch its lowest and its highest. What is not finite is a gap."""
    if len(curve) > MOST_POINTS:
        width = math.ceil(2 * len(curve) / MOST_POINTS)
        kept = []
        for begin in range(0, len(curve), width):
            part = curve[begin : begin + width]
            finite = [item for item in part if math.isfinite(item[1])] or part[:1]
            ends = {min(finite, key=lambda item: item[1]), max(finite, key=lambda item: item[1])}
            kept += sorted(ends)
        curve = kept
    return [step for step, _ in curve], [_short(value) if math.isfinite(value) else None for _, value in curve]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _label(name: str, names: Sequence[str]) -> str:
    """A metric's name without what all names of the chart have in common."""
    if name in LABELS:
        return LABELS[name]
    parts = [item.split("/") for item in names]
    same = 0
    while len(names) > 1 and all(len(part) > same + 1 and part[: same + 1] == parts[0][: same + 1] for part in parts):
        same += 1
    words = name.split("/")[same:] if len(names) > 1 else name.split("/")[-1:]
    return html.escape(" ".join(words).replace("_", " ").removesuffix(" seconds"))


def _lay_out(figure: go.Figure, chart: Chart, legend: bool) -> None:
    axis: Mapping[str, Any] = {
        "showline": False,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 12}},
    }
    figure.update_layout(
        template=None,
        height=380 if chart.wide else 270,
        margin={"l": 52, "r": 14, "t": 24, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="x unified",
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        xaxis={**axis, "gridcolor": "#888", "rangemode": "tozero", **SPIKE},
        yaxis={**axis, "gridcolor": "#888", "rangemode": "tozero" if chart.stacked or chart.from_zero else "normal"},
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        dragmode="zoom",
    )

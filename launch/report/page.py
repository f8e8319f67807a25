"""Runs on one page: a file of HTML that needs no server and no network."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.offline import get_plotlyjs

from data_prep.html import render
from launch.about import version
from launch.report import words
from launch.report.charts import COLORS, MOST_POINTS, Chart, draw
from launch.report.run import Run, axes, label_of


def _summary(name: str) -> tuple[str, ...]:
    """In order of drawing: a band is filled down to the curve before it."""
    return tuple(f"router/{name}_{what}" for what in ("min", "max", "mean"))


CHARTS = (
    Chart("curves", "Loss", "nats per token", ("loss/train", "loss/valid", "loss/valid/*"), wide=True, marked=True),
    Chart("curves", "Perplexity", "per token", ("perplexity", "perplexity/*"), smooth=False),
    Chart("curves", "Word perplexity", "per word", ("word_perplexity", "word_perplexity/*"), smooth=False),
    Chart("curves", "Bits per byte", "", ("bits_per_byte", "bits_per_byte/*"), smooth=False),
    Chart("curves", "Learning rate", "", ("learning_rate",), smooth=False),
    Chart("curves", "Gradient norm", "before clipping", ("gradient_norm",), marked=True),
    Chart("speed", "Throughput", "tokens per second, all", (words.SPEED,), wide=True, marked=True, from_zero=True),
    Chart("speed", "Throughput of a device", "tokens per second", ("throughput/tokens*per_device",), from_zero=True),
    Chart("speed", "Operations of a device", "TFLOP/s", ("throughput/teraflops*",), from_zero=True),
    Chart("speed", "MFU", "of the peak rate", ("throughput/mfu",), from_zero=True),
    Chart(
        "speed",
        "Time per step, by phase",
        "seconds, mean over ranks",
        tuple(f"time/{phase}_seconds" for phase in ("data", "forward", "backward", "optimizer", "other")),
        stacked=True,
        wide=True,
    ),
    Chart("memory", "Memory", "GiB, of the rank that has most", ("memory/*_gib",), smooth=False, from_zero=True),
    Chart("memory", "Memory of nodes and GPUs", "MB", ("system/*memory_usage_megabytes",), from_zero=True),
    Chart("nodes", "Processors and GPUs at work", "%", ("system/*utilization_percentage",), from_zero=True),
    Chart("nodes", "Power", "W", ("system/*power_usage_watts",), from_zero=True),
    Chart("nodes", "Network", "MB since the start", ("system/*network_*megabytes",), from_zero=True),
    Chart("nodes", "Disk", "% used", ("system/*disk_usage_percentage",), from_zero=True),
    *(
        Chart("routers", title, f"{unit}; minimum, mean and maximum over layers", _summary(name), band=True)
        for title, unit, name in (
            ("Gate", "1 is local, 0 global", "gate"),
            ("Pool used", "part, per micro-batch", "hit_rate"),
            ("Entropy of the pool's use", "nats", "entropy_nats"),
            ("Dead rows", "part of the pool that no token chose", "dead_rows"),
        )
    ),
    Chart("routers", "Gate by layer", "", ("router/layer_*/gate",)),
    Chart("routers", "Pool used by layer", "", ("router/layer_*hit_rate",)),
    Chart("routers", "Entropy by layer", "nats", ("router/layer_*entropy_nats",)),
    Chart("routers", "Dead rows by layer", "", ("router/layer_*dead_rows",)),
    Chart("health", "Diversity loss", "of the routers", ("router/diversity_loss",)),
    Chart("health", "Bad numbers", "count so far", ("health/*",), smooth=False),
)
"""Metrics that are not named here get charts of their own, at the end."""

HELD_OUT = (words.VALID_LOSS, "perplexity", "word_perplexity", "bits_per_byte")
"""What is measured on held-out text; of a mixture each dataset's own behind a slash."""

SECTIONS = {
    "summary": "Summary",
    "curves": "Curves",
    "speed": "Speed",
    "memory": "Memory",
    "nodes": "Nodes",
    "routers": "Routers",
    "health": "Health",
    "more": "More",
    "evaluation": "Evaluation",
    "samples": "Samples",
    "checkpoints": "Checkpoints",
    "settings": "Settings",
    "environment": "Environment",
}


@dataclass(frozen=True)
class Sample:
    """A text that a run wrote, and when."""

    run: str
    step: int
    text: str


@dataclass(frozen=True)
class Measured:
    """A held-out measurement: the step and a value for each name."""

    run: str
    step: int
    values: Mapping[str, float]


def page(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    sections = draw(CHARTS, runs)
    every = [drawn for charts in sections.values() for drawn in charts]
    numbers = {id(drawn): number for number, drawn in enumerate(every)}
    samples, measured = _samples(runs), _measured(runs)
    rows = words.settings_table(runs)
    there = {
        "summary": True,
        **{name: name in sections for name in ("curves", "speed", "memory", "nodes", "routers", "more")},
        "health": "health" in sections or any(run.warnings or run.roll_backs or run.ends for run in runs),
        "evaluation": bool(measured),
        "samples": bool(samples),
        "checkpoints": any(run.checkpoints for run in runs),
        "settings": bool(rows),
        "environment": True,
    }
    return render(
        "report.html.jinja",
        "launch.report",
        nonce=secrets.token_urlsafe(16),
        title=" · ".join(label_of(run, runs) for run in runs),
        sections=[(anchor, name) for anchor, name in SECTIONS.items() if there[anchor]],
        runs=runs,
        labels=[label_of(run, runs) for run in runs],
        colors=COLORS,
        charts={name: [(numbers[id(drawn)], drawn) for drawn in charts] for name, charts in sections.items()},
        chart_data=_for_script([json.loads(drawn.figure) for drawn in every]),
        axes_data=_for_script([_rounded(axes(run)) for run in runs]),
        plotly=get_plotlyjs(),
        words=words,
        measured=measured,
        samples=samples,
        settings=rows,
        made=words.moment(max(run.read_at for run in runs)),
        version=version(),
    )


def _samples(runs: Sequence[Run]) -> list[Sample]:
    """The newest first."""
    found = [
        Sample(label_of(run, runs), event.step, str(text))
        for run in runs
        for event in run.events
        if event.kind == "evaluation"
        for text in _texts(event.facts.get("samples"))
    ]
    return sorted(found, key=lambda sample: -sample.step)


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _measured(runs: Sequence[Run]) -> list[Measured]:
    """What was measured on held-out text, the newest first."""
    found = []
    for run in runs:
        for point in run.points:
            if words.VALID_LOSS in point.metrics:
                names = [name for kind in HELD_OUT for name in point.metrics if name.startswith(kind)]
                found.append(Measured(label_of(run, runs), point.step, {name: point.metrics[name] for name in names}))
    return sorted(found, key=lambda item: -item.step)


def _rounded(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """At most MOST_POINTS of each column; between them the page goes in proportion."""
    width = -(-len(columns["step"]) // MOST_POINTS)
    return {
        name: [float(f"{value:.7g}") if math.isfinite(value) else 0.0 for value in [*values[:-1:width], values[-1]]]
        for name, values in columns.items()
    }


def _for_script(values: Any) -> str:
    """JSON that may stand inside a script element: no character of it ends the element or opens a comment."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

"""What is to be said of a run, in words and short figures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from launch.report.run import Checkpoint, Event, Run, axes
from pipeline.metrics.duration import duration
from pipeline.tracking.store import page_of_run_folder

LOSS, VALID_LOSS = "loss/train", "loss/valid"
SPEED = "throughput/tokens_per_second"

REPORT_FILE = "report.html"
"""In the run folder: the page that a job leaves at its end, an artifact of the run in MLflow."""
EMPTY_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
FIRST_ROWS = 12
"""Of such a table; the rest is folded."""
MOST_ROWS = 300
"""Of a table that grows with the run; the newest are shown."""


@dataclass(frozen=True)
class Figure:
    """A short figure with its name."""

    name: str
    value: str


def summary(run: Run) -> list[str]:
    """A run in a few sentences: how it stands, what it reached, how fast it was, what happened to it."""
    return [line for line in (_standing(run), _losses(run), _pace(run), _troubles(run), _kept(run)) if line]


def _standing(run: Run) -> str:
    all_of_them = run.steps is not None and run.step >= run.steps
    taken = (
        f"all {run.step:,} steps" if all_of_them else f"{run.step:,}{f' of {run.steps:,}' if run.steps else ''} steps"
    )
    taken += f", {quantity(run.tokens)} tokens" if run.tokens_per_step else ""
    words = {
        "running": f"It is running: {taken} so far.",
        "done": f"It is done: {taken}.",
        "preempted": f"It was asked to stop after {taken}; the same command goes on from there.",
        "hung": f"It hung after {taken}.",
        "failed": f"It failed after {taken}.",
    }[run.state]
    left = seconds_left(run)
    if run.state == "running" and left is not None:
        words += f" About {duration(left)} are left."
    return words if run.state in ("running", "done") or not run.why else f"{words} Why: {run.why}."


def _losses(run: Run) -> str:
    train, valid = finite(run, LOSS), finite(run, VALID_LOSS)
    parts = []
    if train:
        parts.append(
            f"The training loss went from {train[0][1]:.3f} to {train[-1][1]:.3f} nats per token"
            if len(train) > 1
            else f"The training loss is {train[0][1]:.3f} nats per token"
        )
    if valid:
        step, best = min(valid, key=lambda item: item[1])
        parts.append(f"the held-out loss is {valid[-1][1]:.3f} (perplexity {math.exp(min(valid[-1][1], 700)):,.1f})")
        if step != valid[-1][0]:
            parts[-1] += f" and was best at step {step:,}, with {best:.3f}"
    return sentence("; ".join(parts))


def _pace(run: Run) -> str:
    speeds = [value for _, value in finite(run, SPEED)]
    if not speeds:
        return ""
    mfu = [value for _, value in finite(run, "throughput/mfu")]
    use = f", {middle(mfu):.1%} of the devices' peak rate (MFU)" if mfu else ""
    counts = [f"{count}" for count, _ in groupby(start.facts.get("ranks") for start in run.starts) if count]
    counts = counts or [f"{count}" for count in (ranks(run),) if count]
    device = f" ({run.fact('device')})" if run.fact("device") else ""
    where = f" on {', then '.join(counts)} rank{'s' * (counts != ['1'])}{device}" if counts else ""
    trained = duration(axes(run)["hours"][-1] * 3600)
    return f"It trained for {trained}, at {quantity(middle(speeds))} tokens per second{where}{use}."


def _troubles(run: Run) -> str:
    count = restart_count(run)
    parts = []
    if count:
        last = run.ends[-1] if run.ends else None
        parts.append(f"it was started again {times(count)}" + (f", last after: {last.cause}" if last else ""))
    if run.roll_backs:
        parts.append(f"it went back from a spike {times(len(run.roll_backs))}")
    left_out = run.last("health/left_out_batches")
    if left_out:
        parts.append(f"{left_out:,.0f} batches with bad numbers were left out")
    return sentence("; ".join(parts))


def _kept(run: Run) -> str:
    if not run.checkpoints:
        return ""
    newest, best = run.checkpoints[-1], best_checkpoint(run)
    size = sum(item.bytes for item in run.checkpoints)
    words = f"Kept: {len(run.checkpoints):,} checkpoint{'s' * (len(run.checkpoints) > 1)} ({size_of(size)}), "
    words += f"the newest of step {newest.step:,}"
    if best and best is not newest:
        words += f", the best of step {best.step:,}"
    return f"{words}."


def tiles(run: Run) -> list[Figure]:
    """The figures that one looks for first."""
    loss, valid = run.last(LOSS), run.last(VALID_LOSS)
    best = min((value for _, value in finite(run, VALID_LOSS)), default=None)
    speed, left = run.last(SPEED), seconds_left(run)
    found = [
        Figure(f"of {run.steps:,} steps" if run.steps else "steps", f"{run.step:,}"),
        Figure("tokens", quantity(run.tokens) if run.tokens else ""),
        Figure("training loss", number(loss)),
        Figure("held-out loss", number(valid)),
        Figure("best held-out loss", number(best) if best != valid else ""),
        Figure("tokens per second", quantity(speed) if speed else ""),
        Figure("time left", duration(left) if run.state == "running" and left is not None else ""),
        Figure("restarts", str(restart_count(run) or "")),
    ]
    return [item for item in found if item.value not in ("", "–")]


def closing(run: Run) -> list[str]:
    """What a training came to, in aligned lines for its end, and what one may do next."""
    folder, best = run.folder, best_checkpoint(run)
    train, valid = finite(run, LOSS), finite(run, VALID_LOSS)
    losses = [f"training {train[-1][1]:.4f}"] if train else []
    if valid:
        step, lowest = min(valid, key=lambda item: item[1])
        losses.append(
            f"held-out {valid[-1][1]:.4f}" + (f" (best {lowest:.4f} at step {step:,})" if len(valid) > 1 else "")
        )
    newest = run.checkpoints[-1] if run.checkpoints else None
    kept = [f"{newest.folder}, the newest of {len(run.checkpoints)}"] if newest else []
    if best and best is not newest:
        kept.append(f"the best held-out loss is that of {best.folder.name}")
    rates = [value for _, value in finite(run, SPEED)]
    mfu = [value for _, value in finite(run, "throughput/mfu")]
    speed = [f"{quantity(middle(rates))} tokens per second"] if rates else []
    if mfu:
        speed.append(f"MFU {middle(mfu):.3g}")
    count = restart_count(run)
    again = [f"{count}" + (f", last after: {run.ends[-1].cause}" if run.ends else "")] if count else []
    of = f" of {run.steps:,}" if run.steps else ""
    rows = [
        (run.name, [f"{run.state}, {run.step:,}{of} steps"]),
        ("loss", losses),
        ("checkpoint", kept),
        ("speed", speed),
        ("restarts", again),
        ("why", [run.why] if run.why else []),
        ("report", [str(folder / REPORT_FILE)] if (folder / REPORT_FILE).exists() else []),
    ]
    going_on = f"the same command goes on from step {newest.step:,}" if newest else "the same command begins again"
    following = [shown] if (shown := page_of_run_folder(folder)) else []
    if run.state == "done":
        following += [
            f"globallocal generate {folder} --prompt 'Once upon a time'",
            f"globallocal export {folder} --output {folder}/export",
        ]
    else:
        following.insert(0, going_on)
    lines = [(name, ", ".join(parts)) for name, parts in rows if parts]
    lines += [("" if number else "next", command) for number, command in enumerate(following)]
    width = max(len(name) for name, _ in lines)
    return [f"{name:<{width}}  {said}" for name, said in lines]


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def restart_count(run: Run) -> int:
    return max(len(run.starts) - 1, sum(end.restarted for end in run.ends))


def best_checkpoint(run: Run) -> Checkpoint | None:
    """The one with the lowest held-out loss; None where none was measured at its own step."""
    measured = [item for item in run.checkpoints if item.loss is not None and math.isfinite(item.loss)]
    return min(measured, key=lambda item: item.loss or 0.0, default=None)


def seconds_left(run: Run) -> float | None:
    speed = run.last(SPEED)
    if not speed or not math.isfinite(speed) or run.steps is None or not run.tokens_per_step:
        return None
    return max(run.tokens_after(run.steps) - run.tokens, 0) / speed


def ranks(run: Run) -> int | None:
    kept = [item.state["world_size"] for item in run.checkpoints if isinstance(item.state.get("world_size"), int)]
    told = run.figure("ranks")
    return int(told) if told else next(reversed(kept), None)


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Each setting, its value in each run, and whether the runs differ in it."""
    flat = [_flatten(run.settings) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, ["–" if key not in values else _plain(values[key]) for values in flat]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in rows]


def environment(run: Run) -> list[Figure]:
    """Where and with what a run was computed, as its checkpoints and its record tell."""
    state = run.checkpoints[-1].state if run.checkpoints else {}
    versions = state.get("versions")
    tags = run.fact("tags")
    known = {
        "folder": run.folder,
        "parameters": run.fact("parameters"),
        "ranks": ranks(run),
        "device": run.fact("device"),
        "ZeRO stage": run.fact("zero_stage") or state.get("zero_stage"),
        "precision": run.fact("precision") or state.get("precision"),
        "operations per token": run.fact("flops_per_token"),
        "dataset": state.get("dataset_id"),
        "tokenizer": state.get("tokenizer_sha256"),
        "MLflow run": state.get("mlflow_run_id"),
        **(versions if isinstance(versions, dict) else {}),
        **(tags if isinstance(tags, dict) else {}),
    }
    return [
        Figure(name, f"{value:,}" if isinstance(value, int) else _plain(value))
        for name, value in known.items()
        if value not in (None, "")
    ]


def story(run: Run) -> list[tuple[str, str, str]]:
    """What happened, in order: when, a kind, words."""
    found = [(event.time_unix_seconds, event.kind.replace("_", " "), _told(event)) for event in run.events]
    found += [(end.time_unix_seconds, "launcher", f"{end.cause}; {end.reason}") for end in run.ends]
    ordered = sorted(found, key=lambda item: item[0])[-MOST_ROWS:]
    return [(moment(when), kind, said) for when, kind, said in ordered]


def _told(event: Event) -> str:
    """An event's facts in a line; texts and tables have places of their own on the page."""
    facts = event.facts
    if event.kind == "started":
        said = [f"on {facts.get('ranks', '?')} ranks", str(facts.get("device", "")), str(facts.get("precision", ""))]
    elif event.kind == "saved":
        said = [f"{size_of(facts.get('size_bytes'))} in {_plain(facts.get('seconds', '?'), 2)} s"]
    elif event.kind == "alarm":
        said = [str(facts.get("text", ""))]
    elif event.kind == "evaluation":
        said = [f"held-out loss {number(facts.get('loss'))}"]
    else:
        plain = {name: item for name, item in facts.items() if isinstance(item, str | int | float) and name != "tokens"}
        said = [f"{name.replace('_', ' ')} {_plain(item)}" for name, item in plain.items()]
    place = f"step {event.step:,}" if event.step >= 0 else ""
    return ", ".join(part for part in (place, *said) if part)


def size_of(count: Any) -> str:
    """36.3 MB, 1.2 GB; "?" where it is no number."""
    if not isinstance(count, int | float):
        return "?"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def finite(run: Run, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in run.curve(metric) if math.isfinite(value)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "." if words else ""


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def without_gaps(text: str) -> str:
    """A text whose stretches of empty lines are a sign and a count each: a young model writes hundreds of them."""
    return EMPTY_LINES.sub(lambda found: f"\n⏎ × {found[0].count(chr(10))}\n", text.rstrip())


def number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,.{4 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def quantity(value: float) -> str:
    """843,632 and 1.35 G: short, and with the digits that count."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def moment(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")

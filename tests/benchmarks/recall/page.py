"""docs/recall.md and its picture, from the finished runs alone."""

import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.__main__ import machine
from tests.benchmarks.recall.contenders import CONTENDERS
from tests.benchmarks.recall.plan import Plan
from tests.benchmarks.recall.tasks import TASKS
from tests.conftest import ROOT

FOLDER = ROOT / "docs"
REACHED = 0.9

HEAD = """# What the model can recall

Written by `make bench ARGS="recall"`, from runs in `.cache/recall` (what is missing is trained first: in all some
hundred runs of half a minute, one per core).

A language model must bring back what stood before. Four tests of nothing else, on random tokens, so that no knowledge
helps: the answer stands in the sequence, or nowhere. Every model learns each test from the beginning, at sizes that are
mixed while it trains, and is then asked at these sizes and at larger ones that it has never seen. The loss is that of
the answers alone; a run ends early once 0.99 of them are right at every trained size.

All models are 64 wide and have 0.15 to 0.21 M parameters; AdamW (0.9, 0.95; weight decay 0.1 on matrices; clipping
at 1), a warm-up over a tenth of the steps, then a cosine; float32, the same batches in the same order. Each has, on
each test, the best of the learning rates {rates}: the one whose run with seed {seed} gives the most right
answers at the trained sizes, or of equal ones the shortest run. A figure is the mean over the seeds that ran at that
rate.

| | what it is |
|---|---|
| GlobalLocal | two layers of the model of [quality.md](quality.md) (delta rule, doubled branches), a pool of 256 rows |
| …, averaging | the same with `summary_rule: average`, without short convolutions and delta rule |
| …, no summary | the same with `router_context: token`: its convolutions see 21 tokens, and nothing reaches further |
| GPT | the Llama of `transformers`, four layers, as there, begun as the others; attends to all |
| Gated DeltaNet | three layers of arXiv:2412.06464 and a SwiGLU, in plain torch; a state of constant size |
| Mamba-2 | the same frame with the mixer of arXiv:2405.21060 |

Figures rest on 128 answers or more at each size: at 0.5 they are good to 0.05. Seconds are the processor's, for a
whole run with its evaluations; on a busy machine they come out too high.

**What it does not say.** These are models of 0.2 M parameters after some hundred steps: what a design learns quickly,
not what it could learn in the end, nor what it is worth in text. Attention learns to look back late and all at once
(arXiv:2209.11895), so that a low figure of the GPT may only say that it had not come to it. A "–" was not run.
"""


def write(plan: Plan, folder: Path = FOLDER) -> dict[str, Any]:
    """Write the page and the picture. Returns the headline figures: accuracy at the largest trained size."""
    results = {
        (task, contender): [result for run in plan.finals(task, contender) if (result := run.result())]
        for task in plan.tasks
        for contender in plan.contenders
    }
    results = {key: found for key, found in results.items() if found}
    head = HEAD.format(rates=", ".join(f"{rate:g}" for rate in plan.learning_rates), seed=plan.seeds[0])
    sections = [head, f"{machine()}.", "![Accuracy by size, four tests](recall.svg)", failures(plan, results)]
    sections += [section(plan, task, results) for task in plan.tasks if any(key[0] == task for key in results)]
    if unasked := [TASKS[task].title for task in plan.tasks if not any(key[0] == task for key in results)]:
        sections.append(f"## Not run yet\n\n{', '.join(unasked)}.")
    (folder / "recall.md").write_text("\n\n".join(part.strip() for part in sections) + "\n")
    draw(plan, results, folder / "recall.svg")
    return {
        headline(task): {
            CONTENDERS[contender].title: mean(results[task, contender], TASKS[task].trained[-1])
            for contender in plan.contenders
            if (task, contender) in results
        }
        for task in plan.tasks
    }


def headline(task: str) -> str:
    """What the figure of a task says: accuracy at the largest size that was trained."""
    return f"{TASKS[task].title} of {TASKS[task].trained[-1]} {TASKS[task].size_name}"


def mean(results: list[dict[str, Any]], size: int) -> float:
    """Of the accuracy at one size, over the seeds."""
    return statistics.mean(result["accuracy"][str(size)] for result in results)


def reached(results: list[dict[str, Any]], size: int) -> str:
    """The step at which each seed first had 0.9 of the answers at a size right."""
    steps = [next((str(step) for step, found in r["curve"] if found[str(size)] >= REACHED), "never") for r in results]
    return steps[0] if len(set(steps)) == 1 else ", ".join(steps)


def failures(plan: Plan, results: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """In words: where each GlobalLocal answers fewer than 0.9 rightly, and who does not."""
    lines = ["## What it can and cannot do"]
    for contender in plan.contenders:
        if not CONTENDERS[contender].ours:
            continue
        for task in plan.tasks:
            if (task, contender) in results:
                lines.append(f"- **{CONTENDERS[contender].title}**, {verdict(plan, task, contender, results)}")
    caveat = "A failure at the rates and seeds that were tried (the tables say how many) is a failure so far."
    return "\n".join([lines[0], "", caveat, "", *lines[1:]])


def verdict(plan: Plan, name: str, contender: str, results: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """One contender on one task, and who does better where it fails."""
    task = TASKS[name]
    found = results[name, contender]
    failed = next((size for size in task.asked if mean(found, size) < REACHED), None)
    title = task.title.lower()
    if failed is None:
        return f"{title}: right at every size asked, {task.asked[0]} to {task.asked[-1]} {task.size_name}."
    able = [
        f"{CONTENDERS[other].title}: {mean(results[name, other], failed):.2f}"
        for other in plan.contenders
        if (name, other) in results and mean(results[name, other], failed) >= REACHED
    ]
    seen = "" if failed in task.trained else ", more than it was trained on,"
    asked = any((name, other) in results for other in plan.contenders if not CONTENDERS[other].ours)
    others = " No other model that was asked reaches 0.9 there." if asked else " No other kind of model was asked."
    others = f" {', '.join(able)}." if able else others
    share = f"{mean(found, failed):.2f} of its answers are right, where a guess among what was shown is in"
    return f"{title}: at {failed} {task.size_name}{seen} {share} {task.guess(failed):.2f}.{others}"


def section(plan: Plan, name: str, results: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The table of one task."""
    task = TASKS[name]
    largest = task.trained[-1]
    sizes = [f"{size}" if size in task.trained else f"*{size}*" for size in task.asked]
    lines = [
        f"## {task.title}",
        "",
        task.question,
        f"Trained at {', '.join(map(str, task.trained))} {task.size_name}, {plan.steps or task.steps} steps of "
        f"{task.tokens_per_step} tokens at most; sizes in italics were never trained.",
        "",
        f"| | {' | '.join(sizes)} | step that reaches 0.9 at {largest} | rate (of how many) | seeds | parameters "
        "| CPU seconds |",
        "|---" * (len(sizes) + 6) + "|",
        f"| a guess | {' | '.join(f'{task.guess(size):.2f}' for size in task.asked)} |" + " |" * 5,
    ]
    for contender in plan.contenders:
        found = results.get((name, contender))
        title = CONTENDERS[contender].title
        if not found:
            lines.append(f"| {title} |" + " – |" * (len(sizes) + 5))
            continue
        best = plan.best(name, contender)
        assert best
        tried = sum(run.result() is not None for run in plan.sweep(name, contender))
        cells = [f"{mean(found, size):.2f}" for size in task.asked]
        cells += [reached(found, largest), f"{best.learning_rate:g} ({tried})", str(len(found))]
        cells += [f"{found[0]['parameters'] / 1e6:.2f} M", f"{statistics.mean(r['seconds'] for r in found):.0f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(plan: Plan, results: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Accuracy by size: a panel a task, a line a contender, the trained sizes shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "recall"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(7, 7), sharey=True)
    for panel, name in zip(panels.flat, plan.tasks, strict=False):
        task = TASKS[name]
        panel.axvspan(task.asked[0] / 1.2, task.trained[-1] * 1.2, color="0.94", lw=0)
        for contender, entry in CONTENDERS.items():
            if found := results.get((name, contender)):
                accuracy = [mean(found, size) for size in task.asked]
                panel.plot(task.asked, accuracy, entry.marker, color=entry.colour, label=entry.title)
        panel.set_xscale("log", base=2)
        panel.set_xticks(task.asked, [str(size) for size in task.asked])
        panel.set_title(task.title, fontsize=12)
        panel.set_xlabel(f"{task.size_name} (grey: trained)", fontsize=11)
        panel.set_ylim(-0.03, 1.05)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("share of right answers", fontsize=11)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

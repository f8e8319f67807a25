"""docs/quality.md and its pictures, from the finished runs alone."""

import re
from typing import Any

import numpy as np

from tests.benchmarks.__main__ import machine
from tests.benchmarks.quality.plan import (
    BASES,
    SIZES,
    WIDTH_RATES,
    WIDTHS,
    Size,
    ablations,
    candidates,
    chosen,
    finals,
    label_of,
    sweep,
    swept,
    widths,
)
from tests.benchmarks.quality.text import CACHE
from tests.benchmarks.quality.training import Run
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "quality.md"
NAMES = {"globallocal": "GlobalLocal", "gpt": "GPT"}
BEGINNINGS = {
    "globallocal": "GlobalLocal",
    "gpt": "GPT, deviation 0.02",
    "gpt-embedding": "GPT, embedding 0.5/√width",
}
SCALINGS = "One rate for all", "Matrices at {} / width of the rate"
AXES = {"tokens": "tokens", "FLOPs": "FLOPs", "seconds": "seconds"}

HEAD = """# GlobalLocal against a GPT

Written by `make bench ARGS="quality"`, from runs in `.cache/quality` (what is missing is trained first; sizes C and C4
only where there is a GPU, and sections without runs there stay as they were).

Both models read the same English Wikipedia (2019) through the same byte-pair tokenizer of 8,192 pieces, the same
batches in the same order, under the same AdamW (0.9, 0.95; weight decay 0.1 on matrices; clipping at 1), the same
warm-up and cosine, in float32, on a GPU in bfloat16 with float32 weights for the optimizer. The GPT is the Llama of
`transformers`: RMS norm in front, rotary positions, SwiGLU, SDPA, tied embeddings; residual projections scaled by
depth; its loss runs through the same chunked kernel as GlobalLocal's. It is begun in two ways, and the better one
counts: all with deviation 0.02; the embedding with 0.5/√width (on a GPU only the first). Matrices with 1/√fan_in, as
GlobalLocal's, cost it 0.17 at size A and 0.16 at B (with one rate for all), and are left out.

Sizes are matched in FLOPs per token, to within 10 %, and GlobalLocal has the fewer. Each model has the best of its own
learning rates: of a sweep of its own at sizes A, B and C; A4 and A16 try the best one of A and half of it, C4 those of
C, and take their seconds per step. At sizes A and B each model is swept three times: with one rate for all, and with
matrices over the hidden state at 64 / width and 32 / width of the rate that embedding, norms and biases have
(`optimizer.base_hidden_size`); A4 and A16 keep the share that A found best, C has one rate for all.
Where seeds differ, the rate with the least mean over those that were trained counts. A dash among learning rates: not
trained.

At equal tokens, FLOPs or seconds, the model that has more of them at its end is read on its curve where the other one
ends, before its learning rate has come down. A curve has six points of 4,096 held-out tokens each, and straight lines
between.

On a CPU, seconds are those of the processor in a training step of both models, taken in turns in one process, times the
number of steps: curves over steps do not depend on what else the machine does, and so neither do these.

**What it does not say.** The budgets are those of two CPU cores, some 10^5 tokens, and at size C of minutes on one GPU,
10^7 tokens: the beginning of a training. Whether the order stays the same after 10^9 has not been measured.
"""


def write(results: dict[str, dict[str, Any]], speeds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Write the page and the pictures. Returns the headline figures.

    Args:
        results: of every finished run, by its name.
        speeds: size → contender → CPU seconds per step, measured side by side.
    """
    sections, headline = standing_sections(), {}
    for size in SIZES.values():
        runs = compared(size, results)
        if all(runs.get(name) for name in NAMES) and size.name in speeds:
            sections[f"Size {size.name}"], headline[f"size_{size.name}"] = comparison(
                size, runs, results, speeds[size.name]
            )
            draw(size, runs, results, speeds[size.name])
        sections |= learning_rates(size, results) | ablation_table(size, results)
    sections |= width_transfer(results)
    kinds = ("Size {}", "Learning rates, size {}, seed 0", "Ablations, size {}, seed 0, equal steps")
    order = [kind.format(name) for name in SIZES for kind in kinds]
    sections = {title: sections[title] for title in order if title in sections} | sections
    body = "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in sections.items())
    PAGE.write_text(f"{HEAD}\n{body}")
    return headline


def standing_sections() -> dict[str, str]:
    """Title → text of the page as it is."""
    page = PAGE.read_text() if PAGE.exists() else ""
    return dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))


# ---- the comparison


def compared(size: Size, results: dict[str, Any]) -> dict[str, list[Run]]:
    """Each model's runs at its best learning rate, of the seeds that both have finished, in the same order."""
    planned = finals(size)
    pairs = [pair for pair in zip(*planned.values(), strict=True) if all(run.name in results for run in pair)]
    return {name: [pair[i] for pair in pairs] for i, name in enumerate(planned)}


def axes(run: Run, result: dict[str, Any], seconds_per_step: float) -> dict[str, np.ndarray]:
    """The curve's points on each axis of effort."""
    steps = np.array([step for step, _ in result["curve"]], float)
    tokens = steps * run.batch_size * run.sequence_length
    return {"tokens": tokens, "FLOPs": tokens * result["flops_per_token"], "seconds": steps * seconds_per_step}


def losses(result: dict[str, Any]) -> np.ndarray:
    """The curve, moved so that it ends in the loss over all held-out tokens that were read."""
    curve = np.array([loss for _, loss in result["curve"]])
    return curve + result["valid"]["loss"] - curve[-1]


def at_equal(axis: str, runs: dict[str, list[Run]], results: dict[str, Any], speed: dict[str, float]) -> dict[str, Any]:
    """Loss of each model, a value a seed, where the one that ends first on this axis ends."""
    ends = [axes(r, results[r.name], speed[n])[axis][-1] for n, seeds in runs.items() for r in seeds]
    return {
        name: [
            float(np.interp(min(ends), axes(r, results[r.name], speed[name])[axis], losses(results[r.name])))
            for r in seeds
        ]
        for name, seeds in runs.items()
    } | {"effort": min(ends)}


def comparison(
    size: Size, runs: dict[str, list[Run]], results: dict[str, Any], speed: dict[str, float]
) -> tuple[str, dict[str, Any]]:
    first = {name: results[seeds[0].name] for name, seeds in runs.items()}
    tokens = size.steps * size.batch_size * size.sequence_length
    lines = [
        f"{first['gpt'].get('machine') or machine()}.",
        "",
        f"{size.steps} steps of {size.batch_size} × {size.sequence_length} tokens, {tokens:,} in all; seeds "
        f"{', '.join(str(r.seed) for r in runs['globallocal'])} (weights and data order).",
        "",
        f"![Held-out loss against effort, size {size.name}](quality-{size.name}.svg)",
        "",
        "| | GlobalLocal | GPT |",
        "|---|---|---|",
    ]

    def row(title: str, values: dict[str, str]) -> None:
        lines.append(f"| {title} | {values['globallocal']} | {values['gpt']} |")

    row("parameters", {n: f"{r['parameters'] / 1e6:.2f} M" for n, r in first.items()})
    row("FLOPs per token", {n: f"{r['flops_per_token'] / 1e6:.1f} M" for n, r in first.items()})
    row("width × layers", {n: _shape(runs[n][0]) for n in first})
    row("learning rate", {n: _rates(runs[n][0]) for n in first})
    kind = "device" if size.on_gpu else "CPU"
    row(f"{kind} seconds per step, side by side", {n: f"{speed[n]:.4f}" for n in first})
    figures: dict[str, Any] = {}
    by_seed: dict[str, list[float]] = {}
    for axis, title in AXES.items():
        found = at_equal(axis, runs, results, speed)
        row(f"held-out loss at equal {title}", {n: _spread(found[n]) for n in first})
        means = {n: float(np.mean(found[n])) for n in first}
        figures[f"loss_at_equal_{axis}"] = means
        by_seed[axis] = [ours - theirs for ours, theirs in zip(found["globallocal"], found["gpt"], strict=True)]
    row(
        "held-out bits a byte at the end", {n: _spread(_all(runs[n], results, "valid", "bits_per_byte")) for n in first}
    )
    if all("test" in results[run.name] for seeds in runs.values() for run in seeds):
        row(
            "WikiText-103 test, perplexity a word (245,569 of them, with ends of lines)",
            {n: _spread(_all(runs[n], results, "test", "word_perplexity"), 0) for n in first},
        )
        row("… a token", {n: _spread(_all(runs[n], results, "test", "token_perplexity"), 1) for n in first})
    for axis in ("FLOPs", "seconds"):
        difference = float(np.mean(by_seed[axis]))
        side = "below" if difference < 0 else "ABOVE"
        each = f"; seed by seed {', '.join(f'{d:+.3f}' for d in by_seed[axis])}" if len(by_seed[axis]) > 1 else ""
        lines += ["", f"At equal {AXES[axis]} GlobalLocal's loss is {abs(difference):.3f} {side} the GPT's{each}."]
    return "\n".join(lines), figures


def _shape(run: Run) -> str:
    settings = run.contender.settings
    return f"{settings['hidden_size']} × {settings['num_hidden_layers']}"


def _rates(run: Run) -> str:
    """The learning rate, and that of matrices where it is another."""
    if run.base_hidden_size is None:
        return f"{run.learning_rate:g}"
    share = run.base_hidden_size / run.contender.settings["hidden_size"]
    return f"{run.learning_rate:g}, matrices {run.learning_rate * share:.3g}"


def _title(label: str) -> str:
    beginning, _, base = label.partition("-base")
    return BEGINNINGS[beginning] + (f", matrices at {base} / width of the rate" if base else "")


def _all(runs: list[Run], results: dict[str, Any], split: str, key: str) -> list[float]:
    return [results[run.name][split][key] for run in runs if split in results[run.name]]


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean, and how far from it the farthest seed lies."""
    mean = float(np.mean(values))
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {max(abs(value - mean) for value in values):,.{digits}f}" if len(values) > 1 else text


def draw(size: Size, runs: dict[str, list[Run]], results: dict[str, Any], speed: dict[str, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "quality"
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    shown = {f"{NAMES[name]}, seed {run.seed}": (name, run) for name in NAMES for run in runs[name]}
    rounded = [run for run in ablations(size).values() if run.contender.variant == "bfloat16" and run.name in results]
    shown |= {f"GlobalLocal in bfloat16, seed {run.seed}": ("globallocal", run) for run in rounded}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        for label, (name, run) in shown.items():
            result, colour = results[run.name], {"globallocal": "tab:blue", "gpt": "tab:orange"}[name]
            style = ":" if "bfloat16" in label else ("-", "--", "-.")[run.seed]
            panel.plot(axes(run, result, speed[name])[axis], losses(result), style, color=colour, label=label)
        panel.set_xlabel(title)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.locator_params(axis="x", nbins=6)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"quality-{size.name}.svg", metadata={"Date": None})
    plt.close(figure)


# ---- sweep and ablations


def learning_rates(size: Size, results: dict[str, Any]) -> dict[str, str]:
    runs = sweep(size) if size.learning_rates else {label_of(each[0]): each for each in candidates(size).values()}
    losses = {
        label: [f"{results[r.name]['valid']['loss']:.3f}" if r.name in results else "–" for r in each]
        for label, each in runs.items()
    }
    if all(cell == "–" for cells in losses.values() for cell in cells):
        return {}
    rates = [f"{rate:g}" for rate in size.learning_rates] or [f"size {swept(size).name}'s best", "half of it"]
    lines = [f"| | {' | '.join(rates)} |", "|---" * (len(rates) + 1) + "|"]
    lines += [f"| {_title(label)} | {' | '.join(cells)} |" for label, cells in losses.items() if set(cells) != {"–"}]
    return {f"Learning rates, size {size.name}, seed 0": "\n".join(lines)}


def ablation_table(size: Size, results: dict[str, Any]) -> dict[str, str]:
    done = {title: results[run.name] for title, run in ablations(size).items() if run.name in results}
    if not done:
        return {}
    lines = [
        f"Seeds of one setting differ by up to {seed_spread(size, results):.3f} on this page: a smaller difference "
        "says little.",
        "",
        "| what is changed | held-out loss | against the default | FLOPs per token | parameters |",
        "|---|---|---|---|---|",
    ]
    default = results[chosen(size)["globallocal"].name]
    for title, result in {"the default": default, **done}.items():
        loss = result["valid"]["loss"]
        lines.append(
            f"| {title} | {loss:.3f} | {loss - default['valid']['loss']:+.3f} "
            f"| {result['flops_per_token'] / default['flops_per_token']:.2f} × | {result['parameters'] / 1e6:.2f} M |"
        )
    return {f"Ablations, size {size.name}, seed 0, equal steps": "\n".join(lines)}


def seed_spread(size: Size, results: dict[str, dict[str, Any]]) -> float:
    """The largest difference between seeds of one setting, at all sizes on the device of `size`."""
    groups = [group for other in SIZES.values() if other.on_gpu == size.on_gpu for group in finals(other).values()]
    losses = [_all([r for r in group if r.name in results], results, "valid", "loss") for group in groups]
    return max(max(values) - min(values) for values in losses if values)


def width_transfer(results: dict[str, Any]) -> dict[str, str]:
    """Whether one learning rate serves several widths: tables, and the curves as a picture."""
    losses = {
        base: {
            width: {r.learning_rate: results[r.name]["valid"]["loss"] for r in runs if r.name in results}
            for width, runs in widths(base).items()
        }
        for base in BASES
    }
    if not all(by_width[WIDTHS[1]] for by_width in losses.values()):
        return {}
    draw_widths(losses)
    lines = [
        "Size A's GlobalLocal at several widths, seed 0, 300 steps each; nothing in its initialisation depends on the "
        "width but the deviations, 1/√fan_in of matrices and 0.5/√width of the embedding. The last column: how far the "
        f"loss at the best rate of width {WIDTHS[1]} is above that at the width's own best. A dash: not trained.",
        "",
        "![Held-out loss against the learning rate, by width](quality-widths.svg)",
    ]
    for base, by_width in losses.items():
        lines += ["", f"{SCALINGS[base is not None].format(base)}:", ""]
        lines += ["| width | " + " | ".join(f"{rate:g}" for rate in WIDTH_RATES) + " | lost |"]
        lines += ["|---" * (len(WIDTH_RATES) + 2) + "|"]
        carried = min(by_width[WIDTHS[1]], key=by_width[WIDTHS[1]].__getitem__)
        for width, found in by_width.items():
            lost = f"{found[carried] - min(found.values()):.3f}" if carried in found and len(found) > 1 else "–"
            cells = [f"{found[rate]:.3f}" if rate in found else "–" for rate in WIDTH_RATES]
            lines.append("| " + " | ".join([str(width), *cells, lost]) + " |")
    return {"Learning rate and width": "\n".join(lines)}


def draw_widths(losses: dict[int | None, dict[int, dict[float, float]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "quality"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(losses), figsize=(9, 3.6), sharex=True, sharey=True)
    for panel, (base, by_width) in zip(panels, losses.items(), strict=True):
        for width, found in by_width.items():
            panel.plot(list(found), list(found.values()), "o-", label=f"width {width}")
        panel.set_title(SCALINGS[base is not None].format(base), fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(WIDTH_RATES, [f"{rate:g}" for rate in WIDTH_RATES])
        panel.set_xlabel("learning rate")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "quality-widths.svg", metadata={"Date": None})
    plt.close(figure)


def finished() -> dict[str, dict[str, Any]]:
    """Results of this plan's runs, by name."""
    import json

    wanted = [run for size in SIZES.values() for runs in sweep(size).values() for run in runs]
    wanted += [run for size in SIZES.values() for runs in candidates(size).values() for run in runs]
    wanted += [run for size in SIZES.values() for seeds in finals(size).values() for run in seeds]
    wanted += [run for size in SIZES.values() for run in ablations(size).values()]
    wanted += [run for base in BASES for runs in widths(base).values() for run in runs]
    results = {run.name: result for run in wanted if (result := run.result())}
    for name, result in results.items():
        test = CACHE / f"{name}.test.json"
        if test.exists():
            result["test"] = json.loads(test.read_text())
    return results

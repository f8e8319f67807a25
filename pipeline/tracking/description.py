"""A run's description in MLflow, in Markdown: a pure function of its history."""

from pipeline.settings.batches import trained
from pipeline.tracking.history import BEST_OF, History

NOTE_TAG = "mlflow.note.content"
BELOW = "*Written by GlobalLocal while the run goes on; what you write below this line stays.*"

_STATES = {
    "running": "running",
    "finished": "finished",
    "preempted": "preempted: start it again, and it goes on",
    "interrupted": "interrupted: start it again, and it goes on",
    "lost": "lost: the process was killed; start it again, and it goes on",
    "hung": "hung: a rank did not move; start it again",
    "failed": "failed: the end of its log says why",
}


def describe(history: History) -> str:
    """State and losses in the first line, then a table of what the run is, where it stands and how to go on."""
    steps = history.facts.get("max_steps", 0)
    step = history.latest_step
    of_all = f" of {steps:,}" if steps else ""
    state = history.attempts[-1] if history.attempts else "running"
    headline = [f"**{_STATES.get(state, state)}**", f"step {step:,}{of_all}", *_losses(history)]
    rows = {**history.facts.get("about", {}), "Progress": _progress(history)}
    if len(history.attempts) > 1:
        rows["Starts"] = ", ".join(f"{number} {how}" for number, how in enumerate(history.attempts, start=1))
    if history.checkpoint:
        rows["Checkpoint"] = f"step {history.checkpoint['step']:,}: `{history.checkpoint['path']}`"
    table = [f"| **{_cell(name)}** | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join([" · ".join(headline), "", "| | |", "|---|---|", *table, "", BELOW])


def keep_what_people_wrote(ours: str, current: str) -> str:
    """Our text with what somebody wrote below our last line, or wrote in place of all of it."""
    _, mark, below = current.partition(BELOW)
    theirs = below if mark else current
    return f"{ours}\n\n{theirs.strip()}" if theirs.strip() else ours


def _losses(history: History) -> list[str]:
    said = []
    if train := history.latest.get("loss/train"):
        said.append(f"training loss **{train[1]:.4f}**")
    if (last := history.latest.get(BEST_OF)) and (best := history.best):
        said.append(f"held-out loss **{last[1]:.4f}** at step {last[0]:,}")
        if best != last:
            said.append(f"best {best[1]:.4f} at step {best[0]:,}")
    return said


def _progress(history: History) -> str:
    facts = history.facts
    sizes = facts.get("tokens_per_step", 0), facts.get("warmup_tokens", ()), facts.get("left_out", ())
    tokens = trained(history.latest_step, *sizes)
    speed = history.latest.get("throughput/tokens_per_second")
    said = [f"{tokens:,} tokens"] if tokens else []
    if speed:
        said.append(f"{speed[1]:,.0f} tokens/s")
    return ", ".join(said)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""Which checkpoints stay, why, and how the others go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from pipeline.checkpoints.folder import discard, list_checkpoints, read_state, step_of, verify_sizes
from pipeline.evaluation.figures import loss_at
from pipeline.settings.sections import Retention


@dataclass(frozen=True)
class Entry:
    """One checkpoint, as retention sees it.

    Attributes:
        validation_loss: nats per token, measured at this very step; None where it was not.
        whole: it verifies.
    """

    step: int
    validation_loss: float | None
    whole: bool


def reasons(entries: Sequence[Entry], retention: Retention) -> dict[int, list[str]]:
    """Step → why that checkpoint stays; one without a reason may go.

    Only whole checkpoints are counted, so that damaged ones never push a whole one out; a damaged one has no reason
    to stay. Where none is whole, all stay.
    """
    whole = sorted((entry for entry in entries if entry.whole), key=lambda entry: -entry.step)
    if not whole:
        return {entry.step: ["none verifies"] for entry in entries}
    found: dict[int, list[str]] = {entry.step: [] for entry in entries}
    for entry in whole[: retention.keep_last]:
        found[entry.step].append("newest" if entry is whole[0] else f"newest {retention.keep_last}")
    for entry in whole:
        if retention.keep_every_steps and entry.step % retention.keep_every_steps == 0:
            found[entry.step].append(f"every {retention.keep_every_steps:,} steps")
    measured = [entry for entry in whole if entry.validation_loss is not None]
    for entry in sorted(measured, key=lambda entry: (entry.validation_loss, -entry.step))[: retention.keep_best]:
        found[entry.step].append("best" if retention.keep_best == 1 else f"best {retention.keep_best}")
    return found


def entry(folder: Path, verify: Callable[[Path], list[str]] = verify_sizes) -> Entry:
    """Raises nothing: a folder that cannot be read is not whole."""
    whole = not verify(folder)
    try:
        state = read_state(folder)
    except UserError:
        return Entry(step_of(folder), None, False)
    return Entry(step_of(folder), loss_at(state.evaluation, state.step), whole)


@dataclass(frozen=True)
class Pruned:
    """Attributes:
    deleted: folders that are gone.
    problems: folders that could not be deleted, and why.
    """

    deleted: list[Path]
    problems: list[str]


def doomed(
    root: Path,
    retention: Retention,
    verify: Callable[[Path], list[str]] = verify_sizes,
    newest_step: int | None = None,
) -> list[Path]:
    """The checkpoints of `root` that have no reason to stay, the oldest first.

    Args:
        verify: says what is wrong with a folder.
        newest_step: later checkpoints are left out: they were passed over when the run went on from an earlier one.
    """
    folders = {step_of(folder): folder for folder in list_checkpoints(root)}
    folders = {step: folder for step, folder in folders.items() if newest_step is None or step <= newest_step}
    kept = reasons([entry(folder, verify) for folder in folders.values()], retention)
    return [folders[step] for step in sorted(folders) if not kept[step]]


def prune(
    root: Path,
    retention: Retention,
    verify: Callable[[Path], list[str]] = verify_sizes,
    newest_step: int | None = None,
) -> Pruned:
    """Delete what `doomed` names, one after another; wherever it is killed, the others stand.

    During training it looks at sizes: the newest was hashed and fsynced a moment before.
    """
    pruned = Pruned([], [])
    for folder in doomed(root, retention, verify, newest_step):
        try:
            discard(folder)
            pruned.deleted.append(folder)
        except OSError as error:
            pruned.problems.append(f"{folder}: cannot be deleted: {error.strerror}")
    return pruned

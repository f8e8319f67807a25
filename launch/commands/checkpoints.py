"""`globallocal checkpoints list | verify | prune | reshard`: what stands in a run folder, whether it is whole, what may
go, and all of it in one file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.evaluation.figures import Evaluation
    from pipeline.settings.sections import Retention

RunPath = Annotated[Path, typer.Argument(help="A run folder (or its checkpoints/, or one checkpoint).")]
LINE_SECONDS = 10


def register(app: typer.Typer) -> None:
    checkpoints = typer.Typer(no_args_is_help=True, help="List, verify, prune and reshard the checkpoints of a run.")
    checkpoints.command("list")(list_)
    checkpoints.command()(verify)
    checkpoints.command()(prune)
    checkpoints.command()(reshard)
    app.add_typer(checkpoints, name="checkpoints")


def list_(run: RunPath) -> None:
    """Show every checkpoint: step, age, size, validation loss, how it was written, whole or why not, why it is kept.

    Looks at names and sizes and takes no time; `verify` hashes every byte.

    Example:

        globallocal checkpoints list runs/quickstart
    """
    from rich.console import Console
    from rich.table import Table

    from data_prep.errors import UserError
    from pipeline.checkpoints.folder import INTEGRITY, STATE, read_state, step_of, verify_sizes
    from pipeline.checkpoints.retention import entry, reasons
    from pipeline.checkpoints.space import readable, size_bytes
    from pipeline.settings.section import counted

    folders = _folders(run)
    kept = reasons([entry(folder) for folder in folders], _retention(run))
    table = Table("step", "age", "size", "validation loss", "written with", "state", "kept as", title=str(run))
    for folder in folders:
        problems = verify_sizes(folder)
        loss, written_with = "", ""
        try:
            state = read_state(folder)
            loss = _loss(state.evaluation, state.step)
            written_with = f"ZeRO-{state.zero_stage}, {counted(state.world_size, 'rank')}, {state.precision}"
        except UserError as error:
            problems = problems or error.problems
        seen = next((folder / name for name in (INTEGRITY, STATE) if (folder / name).exists()), folder)
        table.add_row(
            f"{step_of(folder):,}",
            _age(time.time() - seen.stat().st_mtime),
            readable(size_bytes(folder)),
            loss,
            written_with,
            "\n".join(problem.removeprefix(f"{folder}/") for problem in problems) or "whole",
            ", ".join(kept[step_of(folder)]) or "nothing: prune deletes it",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def verify(run: RunPath) -> None:
    """Hash every byte of every checkpoint against its integrity.json; name every fault.

    Exit code 0: all are whole; 2: faults, one line each.

    Examples:

        globallocal checkpoints verify runs/quickstart

        globallocal checkpoints verify runs/quickstart/checkpoints/step-00000200
    """
    from data_prep.errors import UserError
    from pipeline.checkpoints.folder import verify as check
    from pipeline.checkpoints.space import readable, size_bytes

    problems: list[str] = []
    folders = _folders(run)
    with _progress(sum(size_bytes(folder) for folder in folders)) as advance:
        for folder in folders:
            found = check(folder, progress=advance)
            problems += found
            verdict = f"{len(found)} faults" if found else "whole"
            print(f"{folder}: {verdict}, {readable(size_bytes(folder))}", flush=True)
    if problems:
        raise UserError(problems)


def prune(
    run: RunPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete the checkpoints that the run's own settings (config.yaml) do not keep, after hashing all of them.

    Damaged ones go too, where a whole one stands. The newest that verifies is never deleted.

    Example:

        globallocal checkpoints prune runs/quickstart --dry-run
    """
    from data_prep.errors import UserError
    from pipeline.checkpoints import retention
    from pipeline.checkpoints.folder import lock
    from pipeline.checkpoints.folder import verify as check
    from pipeline.checkpoints.space import readable, size_bytes

    folders = _folders(run)
    with _progress(sum(size_bytes(folder) for folder in folders)) as advance:
        faults = {folder: check(folder, progress=advance) for folder in folders}
    root, policy = _root(run), _retention(run)
    doomed = retention.doomed(root, policy, faults.__getitem__)
    freed = readable(sum(size_bytes(folder) for folder in doomed))
    for folder in doomed:
        why = f"damaged: {faults[folder][0]}" if faults[folder] else "whole, not kept by the run's settings"
        typer.echo(f"{'would delete' if dry_run else 'delete'} {folder} ({why})")
    if not dry_run:
        with lock(root.parent):
            pruned = retention.prune(root, policy, faults.__getitem__)
        if pruned.problems:
            raise UserError(pruned.problems)
    typer.echo(f"{len(doomed)} of {len(folders)} checkpoints, {freed}; {len(folders) - len(doomed)} stay")


def reshard(
    run: Annotated[
        Path, typer.Argument(help="A run folder (its newest verified checkpoint is taken) or a checkpoint.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The folder to put step-XXXXXXXX in; RUN/resharded when absent.")
    ] = None,
) -> None:
    """Write a checkpoint of many ranks as one file: fp32 weights and AdamW's moments, by parameter.

    A resume needs none of this: it reads a checkpoint of any number of ranks and any ZeRO stage as it stands. This
    is for the archive, the move to another cluster, and other programs (`torch.load(…, weights_only=True)`). A run
    goes on from it with checkpoint.resume=FOLDER. Takes 12 bytes of memory and of disk a parameter.

    Example:

        globallocal checkpoints reshard runs/quickstart
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading needs no device, and DeepSpeed none to warn about
    from pipeline.checkpoints.consolidate import consolidate
    from pipeline.checkpoints.folder import newest_verified_alone
    from pipeline.checkpoints.space import readable, size_bytes

    folder = run if run.name.startswith("step-") else newest_verified_alone(_root(run))
    made = consolidate(folder, output or _root(run).parent / "resharded", lambda line: print(line, flush=True))
    typer.echo(f"{made}: {readable(size_bytes(made))} in one file; go on from it with checkpoint.resume={made}")


def _root(run: Path) -> Path:
    """The folder that holds the run's checkpoints."""
    if run.name.startswith("step-"):
        return run.parent
    return run if run.name == "checkpoints" else run / "checkpoints"


def _folders(run: Path) -> list[Path]:
    """The checkpoints that a command is about, the newest first. Raises UserError where there is none."""
    from data_prep.errors import UserError
    from pipeline.checkpoints.folder import list_checkpoints

    if run.name.startswith("step-") and run.is_dir():
        return [run]
    folders = list_checkpoints(_root(run))
    if not folders:
        reason = "has no checkpoint" if _root(run).is_dir() else "is no run folder: it has no checkpoints/"
        raise UserError(f"{run}: {reason}; give the folder of a run (run.output_dir, or runs/<run.name>)")
    return folders


def _retention(run: Path) -> Retention:
    """A setting as the run's config.yaml has it."""
    from pipeline.config import load_config

    return load_config(_root(run).parent / "config.yaml").retention


def _loss(evaluation: Evaluation | None, step: int) -> str:
    if evaluation is None:
        return ""
    return f"{evaluation.loss:.4f}" + (f" (step {evaluation.step:,})" if evaluation.step != step else "")


def _age(seconds: float) -> str:
    from pipeline.metrics.duration import duration

    return duration(max(seconds, 0))


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Bytes hashed, rate and time left: a bar on a terminal, a line every ten seconds without one."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    if sys.stderr.isatty():
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("hashing", total=total_bytes)
            yield lambda count: bar.advance(task, count)
        return
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= LINE_SECONDS:
            said, rate = now, done / (now - began)
            left = (total_bytes - done) / rate
            print(f"{100 * done / total_bytes:.0f} %, {rate / 1e6:,.0f} MB/s, {left:,.0f} s left", file=sys.stderr)

    yield advance

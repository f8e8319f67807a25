"""What each model can recall: see docs/recall.md, which this writes.

Half an hour on two cores, and only when named: `make bench ARGS="recall"`. What is finished is kept in
`.cache/recall`, so it goes on where it was interrupted. `python -m tests.benchmarks.bench_recall` does parts of it:
some tasks, contenders, rates, seeds, fewer steps; `--page docs` writes the page from what is there.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.benchmarks.recall import page
from tests.benchmarks.recall.contenders import CONTENDERS
from tests.benchmarks.recall.plan import Plan
from tests.benchmarks.recall.tasks import TASKS
from tests.benchmarks.recall.training import train

TARGETS = {f"{page.headline(task)}.{CONTENDERS['globallocal'].title}": "≥ 0.9" for task in TASKS}


def run() -> dict[str, Any]:
    """Everything that is missing, then the page. Returns the headline figures."""
    plan = Plan()
    train_missing(plan)
    return page.write(plan)


def train_missing(plan: Plan, processes: int = len(os.sched_getaffinity(0))) -> None:
    """The sweeps, then the other seeds at the rates that these chose; each run on one thread."""
    with ExitStack() as stack:
        pool = None
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, get_context("spawn")))
        for stage in (plan.sweep, plan.finals):
            list((pool.map if pool else map)(train, plan.missing(stage)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    plan = Plan()
    for name, kind in {"tasks": str, "contenders": str, "learning_rates": float, "seeds": int}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", type=kind, default=getattr(plan, name))
    parser.add_argument("--steps", type=int, help="of every run; without, what each task says")
    parser.add_argument("--folder", type=Path, default=plan.folder, help="of the finished runs")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write the page there, and train nothing")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    given = parser.parse_args(arguments)
    values = {field.name: getattr(given, field.name) for field in fields(Plan)}
    plan = Plan(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    if given.page:
        print(json.dumps(page.write(plan, given.page), indent=2))
    else:
        train_missing(plan, given.processes)


if __name__ == "__main__":
    main()

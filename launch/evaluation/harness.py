"""Tasks of EleutherAI's lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from launch.evaluation.measurement import plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from launch.evaluation.options import TaskOptions, TextOptions
    from pipeline.export.load import Loaded

NEEDED = ("lm_eval", "accelerate")


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        error: the standard error as the harness estimates it; None where it does not.
        few_shot: examples in front of each.
    """

    task: str
    metric: str
    value: float
    error: float | None
    examples: int | None
    few_shot: int | None


@dataclass(frozen=True)
class Scored:
    """What the harness found; stands beside `Measurement`."""

    model: str
    step: int | None
    max_samples: int | None
    scores: Sequence[Score]
    version: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        facts = {**vars(self), "scores": [vars(score) for score in self.scores], "seconds": round(self.seconds, 3)}
        return {"lm_eval_version" if name == "version" else name: value for name, value in facts.items()}

    def show(self, console: Console) -> None:
        step = "" if self.step is None else f", step {self.step:,}"
        first = f", the first {self.max_samples:,} examples of each task" if self.max_samples else ""
        console.print(
            f"{self.model}{step}: lm-evaluation-harness {self.version}{first}", soft_wrap=True, highlight=False
        )
        console.print()
        table = plain_table("task", "metric", "value", "standard\nerror", "examples", "few-shot")
        for score in self.scores:
            error = "" if score.error is None else f"± {score.error:.4f}"
            counts = ("" if number is None else f"{number:,}" for number in (score.examples, score.few_shot))
            table.add_row(score.task, score.metric, f"{score.value:.4f}", error, *counts)
        console.print(table)

    def values(self) -> dict[str, float]:
        """Under names of metrics."""
        return {f"evaluated/{score.task}/{score.metric}": score.value for score in self.scores}

    def rows(self) -> list[dict[str, Any]]:
        """Of a table in MLflow."""
        return [{"step": self.step, "max_samples": self.max_samples, **vars(score)} for score in self.scores]

    table, key = "tasks.json", ("step", "task", "metric", "few_shot", "max_samples")


def prepare() -> None:
    """To be called before heavy imports: bars of what takes seconds are not drawn, and others seldom into a file.

    Raises:
        UserError: the harness, or what it runs models of transformers with, is missing.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"--tasks: {' and '.join(missing)} not found; install them: pip install 'globallocal[harness]'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DELAY", "2" if sys.stderr.isatty() else "10")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def run_tasks(loaded: Loaded, path: Path, options: TaskOptions, text: TextOptions, device: Any) -> Scored:
    """The harness's own program for models of transformers, on the model that is loaded.

    Training never shows the model a beginning-of-text token: a document begins behind the token that ends the one
    before. So that token stands in front of a text here too, where the harness would take the former.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = task_manager(options)
    model = HFLM(
        pretrained=loaded.model.to(device),
        tokenizer=loaded.tokenizer,
        batch_size=text.batch_size,
        prefix_token_id=loaded.tokenizer.eos_token_id,
    )
    begin = time.monotonic()
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=options.names,
            task_manager=manager,
            num_fewshot=options.few_shot,
            limit=text.max_samples,
            log_samples=False,
        )
    except Exception as error:  # of several libraries: a task's YAML, its data, the network
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tasks {','.join(options.names)}: lm-evaluation-harness: {type(error).__name__}: {said}; correct the "
            "task, or see that the Hugging Face hub can be reached"
        ) from error
    assert found is not None, "one process"
    step = loaded.state.step if loaded.state else None
    return Scored(
        str(path), step, text.max_samples, scores_of(found), found["lm_eval_version"], time.monotonic() - begin
    )


def task_manager(options: TaskOptions) -> Any:
    """The harness's index of tasks: of the folder alone where that has all of them, since its own takes a minute.

    Raises:
        UserError: there is no such folder, or no such task.
    """
    from lm_eval.tasks import TaskManager

    folder = options.task_folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder {folder}: no such folder; give the one that holds your YAML files")
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(options.names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=str(folder) if folder else None)
    check_known(options.names, manager.all_tasks)
    return manager


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for every task that the harness does not have, with those of a similar name."""
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"nearest: {', '.join(near)}" if near else "lm_eval ls tasks lists them"
            problems.append(f"--tasks {name}: lm-evaluation-harness has no such task; {hint}")
    if problems:
        raise UserError(problems)


def scores_of(found: Mapping[str, Any]) -> list[Score]:
    """The numbers of the harness's result: {"results": {task: {"acc,none": …, "acc_stderr,none": …}}}."""
    scores = []
    for task, values in found["results"].items():
        examples = found.get("n-samples", {}).get(task, {}).get("effective")
        few_shot = found.get("n-shot", {}).get(task)
        for name, value in values.items():
            metric, comma, way = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            shown = metric if way == "none" else f"{metric} ({way})"
            known = float(error) if isinstance(error, int | float) else None
            scores.append(Score(task, shown, float(value), known, examples, few_shot))
    return scores

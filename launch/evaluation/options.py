"""What a person asks of an evaluation, and what does not go together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from data_prep.errors import UserError
from launch.evaluation.measurement import Reading
from launch.evaluation.picture import KINDS, kind_of


class Window(StrEnum):
    blocks = "blocks"
    sliding = "sliding"


@dataclass(frozen=True)
class TextOptions:
    """How text is read."""

    split: str = "valid"
    window: Window = Window.blocks
    stride: int | None = None
    sequence_length: int | None = None
    max_samples: int | None = None
    batch_size: int = 8
    by_position: bool = False

    def reading(self, own_length: int) -> Reading:
        """With what was left open filled in.

        Args:
            own_length: the model's sequence length in training.

        Raises:
            UserError: a stride that would leave targets out.
        """
        length = self.sequence_length or own_length
        stride = (self.stride or max(1, length // 2)) if self.window is Window.sliding else length
        if stride > length:
            raise UserError(
                f"--stride {stride:,} is above the window's {length:,} tokens, and what lies between two windows would "
                f"not be measured; give {length:,} or less"
            )
        return Reading(self.split, length, stride, self.max_samples)


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness, in place of text."""

    tasks: str | None = None
    task_folder: Path | None = None
    few_shot: int | None = None

    @property
    def names(self) -> list[str]:
        return [name for item in (self.tasks or "").split(",") if (name := item.strip())]


@dataclass(frozen=True)
class OutputOptions:
    """Where the figures go."""

    json: Path | None = None
    picture: Path | None = None
    record: bool = False


def check_together(datasets: list[str], text: TextOptions, tasks: TaskOptions, output: OutputOptions) -> None:
    """Raises UserError with every pair of options that do not go together."""
    sliding = text.window is Window.sliding
    wrong = {
        "--stride: is of a sliding window; add --window sliding": text.stride is not None and not sliding,
        "--by-position: positions are those in blocks; leave --window sliding out": text.by_position and sliding,
        "--picture: draws what --by-position finds; add that": output.picture is not None and not text.by_position,
        "--tasks: names no task; give one or more, such as hellaswag": tasks.tasks is not None and not tasks.names,
        "--task-folder, --few-shot: are of tasks; add --tasks NAME": not tasks.tasks
        and (tasks.task_folder or tasks.few_shot) is not None,
        "--tasks: bring their own text; leave --dataset, --window, --sequence-length and --by-position out": bool(
            tasks.tasks and (datasets or sliding or text.sequence_length or text.by_position)
        ),
    }
    if output.picture is not None and kind_of(output.picture) is None:
        wrong[f"--picture {output.picture}: give a name that ends in .{', .'.join(KINDS)}"] = True
    if problems := [problem for problem, found in wrong.items() if found]:
        raise UserError(problems)

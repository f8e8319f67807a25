"""Which runs make up the comparison: on each task, each contender has the best of the same rates."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.recall.contenders import CONTENDERS
from tests.benchmarks.recall.tasks import TASKS
from tests.benchmarks.recall.training import CACHE, Run


@dataclass(frozen=True)
class Plan:
    """What is compared; the defaults are the whole of it.

    Args:
        steps: of every run; None for what each task says.
        folder: where finished runs are kept.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    learning_rates: tuple[float, ...] = (0.002, 0.004, 0.008)
    seeds: tuple[int, ...] = (0, 1)
    steps: int | None = None
    folder: Path = CACHE

    def sweep(self, task: str, contender: str) -> list[Run]:
        """One run a rate, with the first seed."""
        steps = self.steps or TASKS[task].steps
        return [Run(task, contender, rate, self.seeds[0], steps, self.folder) for rate in self.learning_rates]

    def best(self, task: str, contender: str) -> Run | None:
        """The finished run of the sweep with the best accuracy over the trained sizes; of equal ones, the shortest."""

        def order(run: Run) -> tuple[float, int]:
            result = run.result()
            assert result
            _, trained = result["curve"][-1]
            return -sum(trained.values()), result["steps"]

        return min((run for run in self.sweep(task, contender) if run.result()), key=order, default=None)

    def finals(self, task: str, contender: str) -> list[Run]:
        """The best rate with every seed."""
        best = self.best(task, contender)
        return [replace(best, seed=seed) for seed in self.seeds] if best else []

    def missing(self, stage: Callable[[str, str], list[Run]]) -> list[Run]:
        """What is not finished of `sweep`, or of `finals` as far as the sweeps have come."""
        pairs = [(task, contender) for task in self.tasks for contender in self.contenders]
        return [run for pair in pairs for run in stage(*pair) if run.result() is None]

"""Who does the encoding. Every engine maps a function over tasks and yields the results in order."""

from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from data_prep.documents import Task
from data_prep.errors import UserError

Result = TypeVar("Result")


class Engine(Protocol):
    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks; the first error of a task is raised here."""
        ...


class ProcessEngine:
    """Local processes; with one worker, this process itself."""

    WINDOW = 4  # tasks in flight for each worker: bounds memory, hides uneven tasks

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers is {workers}; it must be 1 or more")
        self.workers = workers

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        if self.workers == 1:
            yield from map(function, tasks)
            return
        context = multiprocessing.get_context("forkserver")
        pool = ProcessPoolExecutor(self.workers, context, initializer=_install, initargs=(function,))
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_run, task))
                while len(waiting) >= self.workers * self.WINDOW:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again with fewer --workers, "
                "it goes on where it stopped"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_function: Callable[[Task], object] | None = None


def _install(function: Callable[[Task], object]) -> None:
    """Gives a worker its function once, not with every task."""
    global _function
    _function = function


def _run(task: Task):
    assert _function is not None
    return _function(task)

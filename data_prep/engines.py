"""Who does the encoding. Every engine maps a function over tasks and yields the results in order."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from data_prep.documents import Task
from data_prep.errors import UserError

WINDOW = 4  # tasks in flight for each worker: bounds memory, hides uneven tasks

# Maps tasks to results, in the order of the tasks; the first error of a task is raised in the caller.
OrderedMap = Callable[[Iterable[Task]], Iterator[Any]]


class Engine(Protocol):
    """Workers, to be started once for a whole preparation."""

    def start(self, function: Callable[[Task], Any]) -> Any:
        """A context manager that yields an `OrderedMap` of `function`."""
        ...


class ProcessEngine:
    """Local processes; with one worker, this process itself."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers is {workers}; it must be 1 or more")
        self.workers = workers

    @contextmanager
    def start(self, function: Callable[[Task], Any]) -> Iterator[OrderedMap]:
        if self.workers == 1:
            yield lambda tasks: map(function, tasks)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.encode", "data_prep.files"])  # imported once, not by each
        pool = ProcessPoolExecutor(self.workers, context, initializer=_install, initargs=(function,))
        try:
            yield lambda tasks: windowed(tasks, lambda task: pool.submit(_run, task), self.workers * WINDOW)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again with fewer --workers, "
                "it goes on where it stopped"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def windowed(tasks: Iterable[Task], submit: Callable[[Task], Future[Any]], window: int) -> Iterator[Any]:
    """Results in order, with at most `window` tasks submitted and not yet taken."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    for task in tasks:
        if len(waiting) >= window:
            yield waiting.popleft().result()
        waiting.append(submit(task))
    while waiting:
        yield waiting.popleft().result()


_function: Callable[[Task], Any] | None = None


def _install(function: Callable[[Task], Any]) -> None:
    """Gives a worker its function once, not with every task; ties its life to this process's."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlived a killed parent would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _run(task: Task) -> Any:
    assert _function is not None
    return _function(task)

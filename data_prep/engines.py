"""Engines, which do the encoding: each maps a function over tasks and yields the results in order."""

from __future__ import annotations

import collections
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, Protocol

from data_prep.errors import UserError
from data_prep.sources.documents import Task

MAX_WORKERS = 1024
LOOK_SECONDS = 5.0  # between two looks at the workers, while one is waited for
WINDOW = 4  # tasks in flight for each worker: bounds memory, hides uneven tasks

# Maps tasks to results, in the order of the tasks; the first error of a task is raised in the caller.
OrderedMap = Callable[[Iterable[Task]], Iterator[Any]]


class Engine(Protocol):
    """Workers, to be started once for a whole preparation."""

    def begin(self) -> None:
        """Starts what `start` would have to wait for; it gets ready while the caller does other work."""
        ...

    def start(self, function: Callable[[Any], Any]) -> Any:
        """A context manager that yields an `OrderedMap` of `function`."""
        ...


class InProcess:
    """The engine that works in this process itself."""

    def begin(self) -> None: ...

    @contextmanager
    def start(self, function: Callable[[Any], Any]) -> Iterator[OrderedMap]:
        yield lambda tasks: map(function, tasks)


class ProcessEngine:
    """Local processes. An error or Ctrl-C ends them at once, whatever they are at.

    Two private names of the pool are used, since nothing public ends a read that a killed worker left half done: pipes
    and processes of our own would be the pool written anew. `tests/data_prep/test_interrupt.py` says when they change.
    """

    def __init__(self, workers: int) -> None:
        if not 1 <= workers <= MAX_WORKERS:
            raise UserError(f"workers is {workers}; it must be 1 to {MAX_WORKERS:,}")
        self.workers = workers

    def begin(self) -> None:
        # Imported once, not by each worker; beside the choice of an encoder, which takes as long.
        forkserver.set_forkserver_preload(["data_prep.encode", "data_prep.sources.files"])
        _start_forkserver()

    @contextmanager
    def start(self, function: Callable[[Any], Any]) -> Iterator[OrderedMap]:
        self.begin()
        context = multiprocessing.get_context("forkserver")
        before = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(self.workers, context, initializer=_install, initargs=(function,))

        def result(future: Future[Any]) -> Any:
            """The pool never hears of a worker that was killed in the middle of writing a result: so look."""
            while not future.done():
                killed = not all(worker.is_alive() for worker in pool._processes.values())
                wait([future], timeout=LOOK_SECONDS)  # the pool says it itself, where it can
                if killed and not future.done():
                    raise BrokenProcessPool
            return future.result()

        try:
            yield lambda tasks: windowed(tasks, lambda task: pool.submit(_run, task), self.workers * WINDOW, result)
        except BaseException as error:
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()  # asked to end, it would first finish its task
            # The pool's thread may be reading a result that a killed worker had half written. This is the last other
            # end of that pipe; with it the read ends.
            pool._result_queue._writer.close()  # type: ignore[attr-defined]
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a worker process was killed (out of memory?); run the same command again with fewer --workers, "
                    "it goes on where it stopped"
                ) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # its thread has ended before the interpreter wakes it to end


def _start_forkserver() -> None:
    """Its children must not hear Ctrl-C, which is for the process that started them, not even while they start."""
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the process that is started
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def windowed(
    tasks: Iterable[Task],
    submit: Callable[[Task], Future[Any]],
    window: int,
    result: Callable[[Future[Any]], Any] = Future.result,
) -> Iterator[Any]:
    """Results in order, with at most `window` tasks submitted and not yet taken."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    for task in tasks:
        if len(waiting) >= window:
            yield result(waiting.popleft())
        waiting.append(submit(task))
    while waiting:
        yield result(waiting.popleft())


_function: Callable[[Task], Any] | None = None


def _install(function: Callable[[Task], Any]) -> None:
    """Gives a worker its function once, not with every task; ties its life to this process's."""
    global _function
    _function = function
    collect_rarely()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def collect_rarely() -> None:
    """Python's collector looks for cycles among documents, which have none, for a fifth of a worker's time."""
    gc.freeze()  # what is imported stays
    gc.set_threshold(100_000)


def _end_with_parent() -> None:
    """A worker that outlived a killed parent would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _run(task: Task) -> Any:
    assert _function is not None
    return _function(task)

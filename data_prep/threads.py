"""Work that leaves the interpreter to others (reading, hashing), on several threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in their order, on a thread for each core of this process; few are begun ahead.

    Raises:
        Exception: whatever `work` raised first; what had not begun by then is left.
    """
    cores = len(os.sched_getaffinity(0))
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > 2 * cores:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

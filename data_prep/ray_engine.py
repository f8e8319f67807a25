"""Encoding on the hosts of a Ray cluster: the same tasks, the same results, in the same order.

Every node needs this package installed, and access to the source's files (a shared folder, s3 or http).
The target is written by the process that called, alone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.engines import WINDOW, OrderedMap, collect_rarely, windowed
from data_prep.errors import UserError
from data_prep.sources.documents import Task

CONNECT_SECONDS = 10
MAX_RETRIES = 20  # of a task whose worker or node died


class RayEngine:
    """Ray tasks, one CPU each.

    Args:
        address: of a running cluster, such as "auto" or "10.0.0.1:6379"; None starts one on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._mine = False  # whether the connection is this engine's, to be closed

    def begin(self) -> None:
        ray = _import_ray()
        if ray.is_initialized():
            return
        try:
            if self.address and ":" in self.address:  # Ray itself would knock for many minutes
                host, port = self.address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"no Ray cluster at '{self.address}' ({error}); start one with `ray start --head`, "
                "or leave --ray-address out; if one runs there, it may ask for a token: set RAY_AUTH_MODE=token"
            ) from error
        self._mine = True
        get_ready = ray.remote(num_cpus=1)(_get_ready)
        for _ in range(_cpus(ray)):
            get_ready.remote()

    @contextmanager
    def start(self, function: Callable[[Task], Any]) -> Iterator[OrderedMap]:
        ray = _import_ray()
        self.begin()
        try:
            run = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
            shared = [ray.put(function)]  # in a list, so that a task gets the reference, not the value
            yield lambda tasks: windowed(tasks, lambda task: run.remote(shared, task).future(), _cpus(ray) * WINDOW)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the Ray cluster lost a task {MAX_RETRIES} times ({' '.join(str(error).split())[:200]}); "
                "look at its nodes, then run the same command again: it goes on where it stopped"
            ) from error
        finally:
            if self._mine:
                ray.shutdown()
                self._mine = False


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray; install it with `pip install 'ray>=2.40'`") from None
    return ray


def _cpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _get_ready() -> None:
    """A worker imports what its first task needs."""
    import data_prep.encode
    import data_prep.sources.files  # noqa: F401


_functions: dict[str, Callable[[Task], Any]] = {}


def _run(shared: list[Any], task: Task) -> Any:
    """A worker keeps the function between tasks, with the words that it has met."""
    key = shared[0].hex()
    if key not in _functions:
        _functions[key] = _import_ray().get(shared[0])
        collect_rarely()
    return _functions[key](task)

"""Asking again while a fault may pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data_prep.errors import UserError

T = TypeVar("T")


def retried(request: Callable[[], T], wait: Callable[[Exception, int], None]) -> T:
    """Makes a request, and makes it again after each fault that may pass; returns the answer.

    Args:
        wait: called with the fault and the count of faults so far; it sleeps before the next try, or raises UserError
            where that would be in vain or there were enough.
    """
    failures = 0
    while True:
        try:
            return request()
        except UserError:
            raise
        except Exception as error:  # every storage client has exceptions of its own
            failures += 1
            wait(error, failures)

"""Exceptions that the command line prints as plain lines: what a person can fix, and what a person asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LONGEST_LINE = 1000


class UserError(Exception):
    """A mistake or a fault outside the program: bad input, a full disk, a damaged file.

    Each problem is one line that names the value, the bound and the remedy. The command line prints
    the lines without a traceback and exits with code 2.

    Args:
        problems: one line, or all the lines that were found at once.
    """

    exit_code = 2
    word = "error"  # before each line on the command line

    def __init__(self, problems: str | Sequence[str]) -> None:
        given = [problems] if isinstance(problems, str) else problems
        self.problems = [_one_line(problem) for problem in given]
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        return type(self), (self.problems,)  # from a worker process it comes as it was raised


def _one_line(problem: str) -> str:
    """A library's own words may be many lines, and a value of any length; the remedy at the end stays."""
    line = " ".join(problem.splitlines())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 301]}…{line[-300:]}"


class Interrupted(UserError):
    """Ctrl-C: one line that says what the same command would do next."""

    exit_code = 130
    word = "interrupted"


@contextmanager
def interruptible(next_time: str) -> Iterator[None]:
    """Turns Ctrl-C into `Interrupted`; `next_time` says what the same command does next."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(next_time) from None

"""What a person can fix: the only exception that the command line prints as plain lines."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake or a fault outside the program: bad input, a full disk, a damaged file.

    Each problem is one line that names the value, the bound and the remedy. The command line prints
    the lines without a traceback and exits with code 2.

    Args:
        problems: one line, or all the lines that were found at once.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

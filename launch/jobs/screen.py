"""The screen of a job: its lines; on a terminal, progress on one live line, and warnings that stand out.

The log keeps every line as it was printed.
"""

import re
import sys
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

CHATTER = re.compile(
    rb"\[(INFO|WARNING)\] \[\w+\.py:"
    rb"|\[ERROR\] \[(launch|runner|multinode_runner)\.py:"
    rb"|^(?:[\w.-]+: )?DeepSpeed \S+ built successfully|^Loading extension module |^ninja: no work to do"
    rb"|^Using \S+ as PyTorch extensions root|^Time to load \S+ op:"
)
"""What DeepSpeed and its launcher say of themselves: kept in the log only."""
_HOST = r"^(?:[\w.-]+: )?"
"""pdsh and srun say whose line it is."""
STEP = re.compile(_HOST + r"step (?P<step>[\d,]+)/(?P<steps>[\d,]+)  (?P<rest>.*)")
STYLES = (
    (re.compile(_HOST + r"(error: |critical: |hang: |globallocal: rank \d+ on )"), "bold red"),
    (re.compile(_HOST + r"(warning: |globallocal: )"), "yellow"),
    (re.compile(_HOST + r"step [\d,]+  held-out "), "bold"),
    (re.compile(_HOST + r"(sample: |tracking: )"), "dim"),
)


class Screen:
    """Shows the lines of a job on our standard output; a context manager.

    Where standard output is no terminal the lines are copied as they are. It may also be closed; the job goes on.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self._live: Progress | None = None
        if wanted and sys.stdout.isatty():
            columns = (
                TextColumn("step {task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[rest]}"),
            )
            self._live = Progress(*columns, console=Console(highlight=False), auto_refresh=False)
            self._task = self._live.add_task("", total=None, rest="", visible=False)

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            with suppress(OSError, ValueError):
                self._live.stop()

    def show(self, line: bytes) -> None:
        """One line of the job's output, its end included."""
        if not self._wanted or CHATTER.search(line):
            return
        with suppress(OSError, ValueError):
            if self._live is None:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            else:
                self._show_live(self._live, line.decode(errors="replace").rstrip("\r\n"))

    def _show_live(self, live: Progress, line: str) -> None:
        match = STEP.match(line)
        if match:
            done, total = (int(match[name].replace(",", "")) for name in ("step", "steps"))
            said = f"{match['step']}/{match['steps']}"
            live.update(
                self._task, description=said, completed=done, total=total, rest=brief(match["rest"]), visible=True
            )
        else:
            live.console.print(Text(line, style=style(line)), soft_wrap=True)
        live.refresh()


def brief(figures: str) -> str:
    """A step's figures in the order in which a narrow terminal may cut them."""
    parts = re.sub(r" \([^)]*\)", "", figures).split("  ")
    last = [part for part in parts if part.startswith(("lr ", "grad "))]
    return "  ".join([*(part for part in parts if part not in last), *last])


def style(line: str) -> str:
    """The style that sets a line off; "" for most."""
    return next((style for pattern, style in STYLES if pattern.search(line)), "")

"""Finds who failed, and how, in what the ranks and their launchers print."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.exit_codes import HANG, PREEMPTED

_CONSEQUENCE = re.compile(r"[Cc]onnection (reset|closed|refused)|[Bb]roken pipe|timed? ?out|[Rr]emote", re.ASCII)
"""What a rank says when another one has gone."""
_OWN_CODES = (1, 2, HANG)
_KILLED = re.compile(r"Killed|Segmentation|Aborted|Bus error|Out Of Memory")


@dataclass(frozen=True)
class Blame:
    """One failure, as a rank or a launcher tells it.

    Attributes:
        node: empty where none is named (a single machine).
        what: one line for a person; it names rank and node.
        certain: False where it may only follow from another failure.
    """

    node: str
    what: str
    certain: bool

    @property
    def is_hang(self) -> bool:
        return self.what.startswith("hang: ")


def blame(line: str) -> Blame | None:
    """The failure that a line of output tells of; None for any other line."""
    for pattern, read in _SPEAKERS:
        match = pattern.search(line)
        if match:
            return read(match)
    return None


def first_cause(blames: Sequence[Blame]) -> Blame | None:
    """The first that is certain, else the first."""
    return next((item for item in blames if item.certain), blames[0] if blames else None)


def _rank(match: "re.Match[str]") -> Blame:
    """A rank's own last words, of pipeline/train.py."""
    return Blame(match["node"], match["words"], not _CONSEQUENCE.search(match["error"]))


def _hang(match: "re.Match[str]") -> Blame:
    """The watch over the ranks, of pipeline/distributed/watchdog.py."""
    return Blame(match["node"], f"hang: {match['words']}", True)


def _launcher(match: "re.Match[str]") -> Blame | None:
    """DeepSpeed's launcher of one node, behind pdsh's prefix where there are several."""
    code, node = int(match["code"]), match["node"] or ""
    if code == PREEMPTED:
        return None
    how = f"ended by signal {-code}" if code < 0 else f"failed (exit code {code})"
    certain = code not in _OWN_CODES  # a rank that fails in our hands says why before it ends
    return Blame(node, f"local rank {match['rank']}{f' on {node}' if node else ''} {how}", certain)


def _pdsh(match: "re.Match[str]") -> Blame | None:
    """pdsh says that one host's command has ended badly, or that the host is gone, and waits for the others."""
    code = int(match["code"])
    if code == PREEMPTED:
        return None
    return Blame(match["node"], f"node {match['node']} failed (exit code {code})", code > 128)


def _srun(match: "re.Match[str]") -> Blame | None:
    how = match["how"]
    if how.startswith("Terminated") or how.endswith(f"exit code {PREEMPTED}"):
        return None  # on request
    return Blame(
        match["node"], f"rank {match['ranks']} on {match['node']} failed: {how}", _KILLED.search(how) is not None
    )


_SPEAKERS: tuple[tuple["re.Pattern[str]", Callable[["re.Match[str]"], Blame | None]], ...] = (
    (re.compile(r"(?:^|\s)hang: (?P<words>rank \d+ \(host (?P<node>[^,)]+).*)"), _hang),
    (
        re.compile(
            r"globallocal: (?P<words>rank \d+ on (?P<node>\S+) failed in (?P<error>.*?))(?: \(traceback: .*\))?\s*$"
        ),
        _rank,
    ),
    (
        re.compile(
            r"^(?:(?P<node>[\w.-]+): )?\[[^]]*\] \[ERROR\] \[launch\.py:.*'--local_rank=(?P<rank>\d+)'"
            r".* exits with return code = (?P<code>-?\d+)"
        ),
        _launcher,
    ),
    (re.compile(r"^pdsh@\S+: (?P<node>\S+): \S+ exited with exit code (?P<code>\d+)"), _pdsh),
    (re.compile(r"^(?:\d+: )?srun: error: (?P<node>[\w.-]+): tasks? (?P<ranks>[\d,-]+): (?P<how>.*)"), _srun),
)

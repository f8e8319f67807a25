"""Hostfiles: which machines, and how many ranks on each."""

import re
from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import UserError

_LINE = re.compile(r"^(?P<host>[A-Za-z0-9_][\w.:-]*)\s+slots=(?P<slots>[1-9]\d*)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host → slots (ranks it can hold), in the order of the file: that of the ranks.

    A line reads `HOST slots=N`; blank lines and `#` comments are skipped.

    Raises:
        UserError: the file is missing, names no host, or every line that is wrong, with its number.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"hostfile {path}: {error.strerror or error}; write one line per machine: HOST slots=N"
        ) from None
    hosts: dict[str, int] = {}
    problems = []
    for number, text in enumerate(lines, start=1):
        line = text.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.match(line)
        if match is None:
            problems.append(f"{path}:{number}: {line!r} is not HOST slots=N (N ≥ 1)")
        elif match["host"] in hosts:
            problems.append(f"{path}:{number}: {match['host']} is named a second time; give all its slots in one line")
        else:
            hosts[match["host"]] = int(match["slots"])
    if not hosts and not problems:
        problems.append(f"{path}: names no host; write one line per machine: HOST slots=N")
    if problems:
        raise UserError(problems)
    return hosts


def select(hosts: Mapping[str, int], include: str = "", exclude: str = "") -> dict[str, int]:
    """The hosts left by `include` or `exclude`: names joined by `@` or commas, whole machines.

    Raises:
        UserError: both are given, a name is not in the hostfile, or no host is left.
    """
    if include and exclude:
        raise UserError(f"--include {include} and --exclude {exclude}: give one of them")
    named = [name for name in re.split(r"[@,]", include or exclude) if name]
    problems = [f"{name} is not in the hostfile, which names {', '.join(hosts)}" for name in named if name not in hosts]
    if problems:
        raise UserError(problems)
    if not named:
        return dict(hosts)
    left = {host: slots for host, slots in hosts.items() if (host in named) == bool(include)}
    if not left:
        raise UserError(f"--exclude {exclude} leaves no host of {', '.join(hosts)}")
    return left

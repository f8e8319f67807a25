"""Every command with empty, enormous, odd and contradictory options, made from the commands themselves.

What a command needs is an empty folder here, so that each ends before it has begun anything. The rule: exit code 2,
one `error:` line per problem (or, of `doctor`, its findings), no traceback, in bounded time, and nothing written.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from data_prep.errors import LONGEST_LINE
from launch.cli import app, main

VALUES = {
    "empty": "",
    "a space": " ",
    "huge": "1" + "0" * 30,
    "negative": "-1",
    "zero": "0",
    "a fraction": "0.5",
    "NaN": "nan",
    "infinite": "inf",
    "text": "yes please",
    "odd text": "-ü\u202b'\"$HOME;\n{}%s\\",
    "a pattern": "[*?]{a,b}",
    "an assignment": "a=b=c",
    "long text": "x" * 10_000,
    "a URL of nothing": "nothing://a/b",
}
FLAG_VALUES = {"with a value": "no"}
EMPTY = "an empty folder"
FURTHER: dict[str, dict[str, str | None]] = {
    "tokenizer": {"--source": "files", "--path": EMPTY},
    "prepare": {"--source": "files", "--path": EMPTY},
    "estimate": {"--config": EMPTY},
    "doctor": {"--config": EMPTY},
}
"""What a command is given beside what it requires, or it would begin, or look at this machine alone."""
LONGEST_SECONDS = 30.0


@dataclass(frozen=True)
class Case:
    name: str
    words: tuple[str, ...]


def commands() -> dict[tuple[str, ...], Any]:
    """Every command by its words."""

    def below(group: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, (*words, name))
            else:
                yield (*words, name), command

    return dict(below(typer.main.get_command(app), ()))


def cases() -> Iterator[Case]:
    """Of every command: nothing, each option with each value, too much, and each two options together."""
    for words, command in commands().items():
        yield from cases_of(words, command)


def cases_of(words: tuple[str, ...], command: Any) -> Iterator[Case]:
    options = [item for item in command.params if item.param_type_name == "option" and item.name != "help"]
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    required = {item.opts[-1]: EMPTY for item in options if item.required}
    given = [EMPTY for item in arguments if item.required]

    def case(name: str, options: dict[str, str | None], arguments: list[str] = given) -> Case:
        chosen = {**required, **FURTHER.get(words[-1], {}), **options}
        listed = [option if value is None else f"{option}={value}" for option, value in chosen.items()]
        return Case(f"{' '.join(words)}: {name}", (*words, *listed, *(["--", *arguments] if arguments else [])))

    if required or given:
        yield Case(f"{' '.join(words)}: nothing", words)
    yield case("an unknown option", {"--nonsense": None})
    yield case("a thousand arguments", {}, [*given, *["more"] * 1000])
    for option in options:
        for kind, value in (FLAG_VALUES if option.is_flag else VALUES).items():
            yield case(f"{option.opts[-1]} {kind}", {option.opts[-1]: value})
    for argument in arguments:
        for kind, value in VALUES.items():
            yield case(f"{argument.name} {kind}", {}, [*given[: len(given) - argument.required], value])
    for one, other in itertools.combinations(options, 2):
        together = {item.opts[-1]: plausible(item) for item in (one, other)}
        yield case(" and ".join(together), together)


def plausible(option: Any) -> str | None:
    """A value of the option's kind; None for a flag."""
    if option.is_flag:
        return None
    kind = option.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return str(list(kind)[-1].value)
    return {int: "2", float: "0.5"}.get(kind, EMPTY)


def fault_of(case: Case, folder: Path) -> str | None:
    """What breaks the rule, or None. The command is run in `folder`, which holds nothing."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    words = [word.replace(EMPTY, str(empty)) for word in case.words]
    out, errors = io.StringIO(), io.StringIO()
    before, began = dict(os.environ), time.monotonic()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(words)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        os.environ.clear()
        os.environ.update(before)
    seconds = time.monotonic() - began
    lines = errors.getvalue().splitlines()
    told = out.getvalue() + errors.getvalue()
    if code != 2:
        return f"exit code {code}: {told[:300]}"
    if "Traceback" in told or re.search(r"object at 0x|<class ", told):
        return f"written for a programmer: {told[:300]}"
    if case.words[0] == "doctor" and not lines:
        return None if "error" in told or "✗" in told or "problem" in told else f"no finding: {told[:300]}"
    if not lines or not all(line.startswith("error: ") for line in lines):
        return f"not one line per problem: {errors.getvalue()[:300]!r}"
    if (longest := max(len(line.removeprefix("error: ")) for line in lines)) > LONGEST_LINE:
        return f"a line of {longest:,} characters"
    if left := [item for item in folder.rglob("*") if item != empty]:
        return f"left {', '.join(map(str, left))[:300]}"
    return f"took {seconds:.0f} s" if seconds > LONGEST_SECONDS else None


def faults(which: list[Case], folder: Path) -> list[str]:
    """One line for each case that breaks the rule."""
    found = []
    for case in which:
        if fault := fault_of(case, folder):
            found.append(f"{case.name}: {fault}")
    return found


def run(folder: Path) -> dict[str, object]:
    every = list(cases())
    found = faults(every, folder)
    for line in found:
        print(line, flush=True)
    assert not found, f"{len(found)} of {len(every)} commands break the rule"
    kinds = Counter(" and " in case.name for case in every)
    return {
        "commands with wrong options": f"{len(every):,}, of {len(commands())} commands",
        "… two options together": f"{kinds[True]:,}",
        "ended in one line per problem, nothing written": "all",
    }

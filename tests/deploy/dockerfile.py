"""As much of a Dockerfile as ours uses: its stages, and what each instruction would do."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """Instructions of one stage in order: (WORD, the rest of the line, variables not yet replaced)."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path, arguments: dict[str, str]) -> dict[str, Stage]:
    """Stages by name; `arguments` are build arguments, which replace the defaults of the ARGs before the first FROM."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    known: dict[str, str] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "ARG" and current is None:
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, default)
        elif word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(name, replaced(base, known))
        else:
            assert current is not None, line
            current.instructions.append((word, rest.strip()))
    return stages


def replaced(text: str, values: dict[str, str]) -> str:
    """`$NAME` and `${NAME}` by their values."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)


def settings(rest: str) -> dict[str, str]:
    """`NAME=VALUE NAME=VALUE`, as ENV has them."""
    return dict(word.split("=", 1) for word in shlex.split(rest))


def command(rest: str) -> list[str]:
    """The words of a CMD or HEALTHCHECK CMD in its JSON form."""
    words = json.loads(rest[rest.index("[") :])
    assert isinstance(words, list)
    return [str(word) for word in words]

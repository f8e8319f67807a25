"""`make bench`: run every bench_*.py here, each in a process of its own, and write docs/benchmarks.md.

Arguments: names of benchmarks (`reading`); without, all but `quality`, which takes hours, `recall` and `gpu`. The
sections of the others stay as they were.
"""

import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench`. Each figure compares things measured side by side in one run; absolute speeds are those of the
machine named above each table, and only the ratios travel.
"""
ONLY_WHEN_NAMED = {"quality", "recall", "gpu"}  # hours; half of one; a GPU
PACKAGES = ("torch", "transformers", "sentencepiece", "webdataset", "numpy")


def main(names: list[str]) -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for name in names or [name for name in known if name not in ONLY_WHEN_NAMED]:
        print(f"== {name}", flush=True)
        measured = subprocess.run(
            [sys.executable, "-c", f"from tests.benchmarks.__main__ import measure; measure({name!r})"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        )
        write(name, **json.loads(measured.stdout.splitlines()[-1]))
    print(PAGE.relative_to(ROOT))


def measure(name: str) -> None:
    """In the process of the benchmark: its result, and the targets it states, as the last line."""
    module = importlib.import_module(f"tests.benchmarks.bench_{name}")
    print(json.dumps({"result": module.run(), "targets": getattr(module, "TARGETS", {})}))


def write(name: str, result: dict[str, Any], targets: dict[str, str]) -> None:
    """Put the section of one benchmark into the page, in place of its older one.

    Args:
        result: figures; under `machine`, where they were measured, if not here.
        targets: by the dotted path of a figure in `result`.
    """
    page = PAGE.read_text() if PAGE.exists() else HEAD
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    where = result.pop("machine", None) or machine()
    rows = "\n".join(f"| {shown(path)} | {value} | {targets.get(path, '')} |" for path, value in flat(result))
    sections[name] = f"\n{where}\n\n| figure | value | target |\n|---|---|---|\n{rows}\n\n"
    body = "\n".join(f"## {key}\n{text.rstrip()}\n" for key, text in sorted(sections.items()))
    PAGE.write_text(f"{HEAD}\n{body}")


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(Dotted path, value as text) of every figure."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            text = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)
            text = f"{value:,.0f}" if isinstance(value, int | float) and abs(value) >= 1e4 else text
            rows.append((prefix + key, text))
    return rows


def shown(path: str) -> str:
    return path.replace(".", " · ").replace("_", " ")


def machine() -> str:
    import importlib.metadata as metadata

    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line), model
        )
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    where = f"{datetime.date.today()}, {model}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
    return f"{where}; commit {commit()}"


def commit() -> str:
    """What was measured; a `+` where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(sys.argv[1:])

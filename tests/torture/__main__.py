"""`make torture`: run the long proofs, and write what they saw into docs/reliability.md.

Arguments: names of proofs (`kills`); all when absent. A proof is a module here with a function
`run(folder) -> dict[str, object]` (figures, one a row) that raises AssertionError where a guarantee does not hold.
Its figures stand between two marks in the page's section `Last figures`; the others stay as they were.
"""

import importlib
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.__main__ import machine
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def main(names: list[str]) -> None:
    known = sorted(item.stem for item in Path(__file__).parent.glob("[!_]*.py") if not item.stem.startswith("inputs_"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"error: no proof {', '.join(unknown)}; known: {', '.join(known)}")
    for name in names or known:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"torture-{name}-") as folder:
            figures = importlib.import_module(f"tests.torture.{name}").run(Path(folder))
        write(name, {"measured": machine(), **figures, "seconds": round(time.monotonic() - began)})
    print(PAGE.relative_to(ROOT))


def write(name: str, figures: dict[str, object]) -> None:
    """Put the figures of one proof into the page, in place of its older ones."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    block = f"<!-- torture {name} -->\n### {name}\n\n| figure | value |\n|---|---|\n{rows}\n<!-- end {name} -->"
    page = PAGE.read_text()
    standing = re.compile(rf"<!-- torture {name} -->.*?<!-- end {name} -->", re.S)
    PAGE.write_text(standing.sub(lambda match: block, page) if standing.search(page) else f"{page}\n{block}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

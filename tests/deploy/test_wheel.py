"""The wheel alone, in a clean environment and an empty folder: what it needs is in it and found by name."""

from pathlib import Path

import pytest

from tests.deploy.packages import build_wheel, environment_beside_this, run
from tests.pipeline.ranks import TINY

MARK = "=== next\n"
SEVERAL = f"""
import launch, pipeline, sys
from launch.cli import main
from launch.serve.limits import Limits
from launch.serve.page import page
from launch.serve.protocol import Server

def told(code, *words):
    print({MARK!r}, end="", flush=True)
    sys.stderr = sys.stdout
    assert main(list(words)) in code, (words, code)

print(launch.__file__, pipeline.__file__)
print({MARK!r}, len(page(Server("x", None, 1, Limits()), "")), sep="")
told((0,), "estimate", "--preset", "small")
told((2,), "estimate", "--config", "quickstrat")
told((0,), "config", "schema")
told((0, 1), "doctor", "--skip-step", "--config", "quickstart", *sys.argv[1:])
told((0,), "train", "--processes", "1", "--config", "quickstart", *sys.argv[1:])
told((0,), "report", "runs/quickstart", "--output", "page.html")
"""
"""Commands and imports in one process, which imports everything once."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel installed."""
    folder = tmp_path_factory.mktemp("wheel")
    return environment_beside_this(folder / "clean", build_wheel(folder))


def test_the_installed_files_are_those_that_run(python: Path, tmp_path: Path, small_dataset: Path) -> None:
    settings = [
        *TINY,
        *(f"data.dataset={small_dataset}", "deepspeed.config=zero1", "tracking.enabled=false"),
        *("training.max_steps=2", "checkpoint.interval_steps=2", "evaluation.interval_steps=2"),
    ]
    assert run(python.with_name("globallocal"), "--version", cwd=tmp_path).startswith("globallocal 0.")
    said = run(python, "-c", SEVERAL, *settings, cwd=tmp_path).split(MARK)
    where, page_bytes, estimated, mistyped, schema, looked, trained, _ = said
    assert where.count("clean/lib") == 2
    assert int(page_bytes) > 10_000
    assert "parameters" in estimated
    assert "quickstrat: no such file; there are: launch/runs/quickstart.yaml" in mistyped
    (installed,) = python.parents[1].glob("lib/python*/site-packages/launch/runs/schema.json")
    assert installed.read_text() == schema
    assert "Traceback" not in looked
    assert "ZeRO stage 1" in trained
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "step-00000002" / "integrity.json").exists()
    assert (tmp_path / "page.html").stat().st_size > 1_000_000

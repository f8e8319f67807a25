"""The wheel alone, in a clean environment and an empty folder: what it needs is in it and found by name."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pipeline.ranks import TINY

FOLDERS = ("data_prep", "model", "pipeline", "launch", "ds_configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel installed. Other packages are those of this environment, the editable project not."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("globallocal-*.whl")
    clean = folder / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", clean)
    (packages,) = clean.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read there
    run(*pip, "--python", clean / "bin" / "python", "install", "--no-deps", wheel)
    launcher = Path(sys.executable).with_name("deepspeed").read_text().split("\n", 1)[1]
    (clean / "bin" / "deepspeed").write_text(f"#!{clean}/bin/python\n{launcher}")
    (clean / "bin" / "deepspeed").chmod(0o755)
    return clean / "bin" / "python"


def run(*command: object, cwd: Path | None = None, codes: tuple[int, ...] = (0,)) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode in codes, done.stdout
    return done.stdout


def test_the_installed_files_are_those_that_run(python: Path, tmp_path: Path) -> None:
    where = run(python, "-c", "import launch, pipeline; print(launch.__file__, pipeline.__file__)", cwd=tmp_path)
    assert where.count("clean/lib") == 2
    page = (
        "from launch.serve.limits import Limits; from launch.serve.page import page;"
        "from launch.serve.protocol import Server; print(len(page(Server('x', None, 1, Limits()), '')))"
    )
    assert int(run(python, "-c", page, cwd=tmp_path)) > 10_000
    globallocal = python.with_name("globallocal")
    assert run(globallocal, "--version", cwd=tmp_path).startswith("globallocal 0.")
    assert "parameters" in run(globallocal, "estimate", "--preset", "small", cwd=tmp_path)
    said = run(globallocal, "estimate", "--config", "quickstrat", cwd=tmp_path, codes=(2,))
    assert "quickstrat: no such file; there are: launch/runs/quickstart.yaml" in said


def test_doctor_and_train_find_a_shipped_run_by_its_name(python: Path, tmp_path: Path, small_dataset: Path) -> None:
    globallocal = python.with_name("globallocal")
    settings = [
        *TINY,
        *(f"data.dataset={small_dataset}", "deepspeed.config=zero1", "tracking.enabled=false"),
        *("training.max_steps=2", "checkpoint.interval_steps=2", "evaluation.interval_steps=2"),
    ]
    said = run(globallocal, "doctor", "--config", "quickstart", *settings, cwd=tmp_path, codes=(0, 1))
    assert "Traceback" not in said
    said = run(globallocal, "train", "--config", "quickstart", *settings, cwd=tmp_path)
    assert "ZeRO stage 1" in said
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "step-00000002" / "integrity.json").exists()
    run(globallocal, "report", "runs/quickstart", "--output", "page.html", cwd=tmp_path)
    assert (tmp_path / "page.html").stat().st_size > 1_000_000

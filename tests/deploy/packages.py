"""The project as others get it: a wheel and an sdist, in environments that know nothing of this checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import ROOT

FOLDERS = ("data_prep", "model", "pipeline", "launch", "ds_configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command: object, cwd: Path | None = None, codes: tuple[int, ...] = (0,)) -> str:
    """The output of a command that has one of the exit codes; PYTHONPATH is not handed on."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode in codes, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def source(folder: Path) -> Path:
    """What a package is built of, copied into `folder`."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path) -> Path:
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source(folder / "source"))
    (wheel,) = folder.glob("globallocal-*.whl")
    return wheel


def build_sdist(folder: Path) -> Path:
    """From what `build_wheel` has copied."""
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, folder, cwd=folder / "source")
    (sdist,) = folder.glob("globallocal-*.tar.gz")
    return sdist


def environment_beside_this(folder: Path, *what: object) -> Path:
    """The Python of a new environment with `what` installed. Other packages are those of this one, the project not."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read there
    run(*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-build-isolation", *what)
    launcher = Path(sys.executable).with_name("deepspeed").read_text().split("\n", 1)[1]
    (folder / "bin" / "deepspeed").write_text(f"#!{folder}/bin/python\n{launcher}")
    (folder / "bin" / "deepspeed").chmod(0o755)
    return folder / "bin" / "python"


def environment_from_nothing(folder: Path, *what: object) -> Path:
    """The same, with every package installed anew at the versions of requirements.lock."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "--quiet", "install", "--retries", "10", "--constraint", ROOT / "requirements.lock", *what)
    return python

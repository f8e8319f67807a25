"""Run every command of the Dockerfile's CPU variant, in order, where there is no Docker: in a clean Debian.

    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-dev,python3-pip bookworm ROOT
    python -m tests.deploy.clean_root ROOT WORK [FOLDER_OR_FILE ...]

As root. ROOT stands in for every outside image; each stage is a copy of it, or of the stage it is built on, in WORK.
Further paths of this machine are seen inside, such as what pip is told of by its environment.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.deploy import dockerfile

ARGUMENTS = {"DEVICE": "cpu"}


@dataclass
class Container:
    """A stage as it is being built: its files, and what the instructions so far have set."""

    root: Path
    shared: list[Path]
    environment: dict[str, str] = field(default_factory=lambda: dict(ARGUMENTS))
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "0"

    def run(self, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a command inside, in mount and process namespaces of its own."""
        mounts = ["mount -t proc proc proc", "mount --rbind /dev dev"]
        for path in self.shared:
            inside = self.root / path.relative_to("/")
            (inside.mkdir if path.is_dir() else inside.parent.mkdir)(parents=True, exist_ok=True)
            if path.is_file() and not inside.exists():
                inside.touch()
            mounts.append(f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(inside))}")
        enter = ["chroot", f"--userspec={self.user}:{self.user}", ".", "env", "-C", self.folder, *words]
        script = "\n".join([*mounts, "exec " + shlex.join(enter)])
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script],
            cwd=self.root,
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": self.home,
                **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
                **self.environment,
            },
            stdin=subprocess.DEVNULL,
        )

    def do(self, word: str, rest: str, stages: dict[str, "Container"]) -> None:
        """One instruction. Raises CalledProcessError where its command fails."""
        if word == "ARG":
            name, _, default = rest.partition("=")
            self.environment[name] = ARGUMENTS.get(name, default)
        elif word == "ENV":
            self.environment |= {
                name: dockerfile.replaced(value, {**self.environment, "PATH": self.path})
                for name, value in dockerfile.settings(rest).items()
            }
        elif word == "SHELL":
            self.shell = dockerfile.command(rest)
        elif word == "USER":
            self.user = rest
        elif word == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            self.copy(rest, stages)
        elif word == "RUN":
            self.check([*self.shell, rest])

    @property
    def home(self) -> str:
        """As Docker has it: the user's, and / where the image does not know the number."""
        users = [line.split(":") for line in (self.root / "etc" / "passwd").read_text().splitlines()]
        return next((user[5] for user in users if user[2] == self.user), "/")

    @property
    def path(self) -> str:
        return self.environment.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")

    def check(self, words: list[str]) -> None:
        code = self.run(words).wait()
        if code:
            raise subprocess.CalledProcessError(code, words)

    def copy(self, rest: str, stages: dict[str, "Container"]) -> None:
        """From another stage, or what git tracks of the project."""
        options = dict(re.findall(r"--(\w+)=(\S+)", rest))
        source, target = re.sub(r"--\w+=\S+ ", "", rest).split()
        to = self.root / os.path.join(self.folder, target).lstrip("/")
        if "from" in options:
            shutil.copytree(stages[options["from"]].root / source.lstrip("/"), to, symlinks=True, dirs_exist_ok=True)
        else:
            tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
            ignored = set((ROOT / ".dockerignore").read_text().split())
            for name in tracked.stdout.splitlines():
                if name.partition("/")[0] in ignored:
                    continue
                place = to / name if source == "." or target.endswith("/") else to
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place)
        if "chown" in options:
            self.check(["chown", "--recursive", f"{options['chown']}:", os.path.join(self.folder, target)])


def main(base: Path, work: Path, shared: list[Path]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    built: dict[str, Container] = {}
    stages = dockerfile.read(ROOT / "Dockerfile", ARGUMENTS)
    for name in [name for name in stages if name != "toolkit-cuda"]:
        stage = stages[name]
        origin = built[stage.base].root if stage.base in built else base
        subprocess.run(["cp", "--archive", "--reflink=auto", str(origin), str(work / name)], check=True)
        shutil.copy2("/etc/resolv.conf", work / name / "etc")
        built[name] = Container(work / name, shared)
        for word, rest in stage.instructions:
            start = time.monotonic()
            print(f"{name}: {word} {rest[:150]}", flush=True)
            built[name].do(word, rest, built)
            print(f"{name}: {word} done in {time.monotonic() - start:.0f} s", flush=True)
    for name in ("tracking", "runtime"):
        instructions = dict(stages[name].instructions)  # the last of each word
        program = built[name].run(dockerfile.command(instructions["CMD"]))
        for attempt in range(60):
            time.sleep(2)
            if not built[name].run(dockerfile.command(instructions["HEALTHCHECK"])).wait():
                print(f"{name}: healthy at attempt {attempt + 1}", flush=True)
                break
        else:
            sys.exit(f"{name}: never healthy")
        program.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), [Path(word) for word in sys.argv[3:]])

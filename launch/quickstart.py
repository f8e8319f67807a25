"""The whole job, end to end, in minutes: real text → tokenizer → shards → training, killed and resumed →
a folder that `transformers` loads. Every step is a command that a user could type; it is shown before it runs.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.tracking.store import page_of_run_folder

CONFIG = Path("launch/runs/quickstart.yaml")
TOKENIZER = Path("data/quickstart-tokenizer")
DATASET = Path("data/quickstart")
RUN = Path("runs/quickstart")
EXPORT = RUN / "export"
REPORT = RUN / "report.html"
PROMPT = "The history of"


def main() -> int:
    started = time.monotonic()
    command("Train a tokenizer", "tokenizer", "--source", "sample", "--vocab-size", "4096", "--output", TOKENIZER)
    command(
        "Prepare the shards, once",
        "prepare",
        "--source",
        "sample",
        "--tokenizer",
        TOKENIZER,
        "--output",
        DATASET,
    )
    train = ["train", "--config", CONFIG]
    if not any((RUN / "checkpoints").glob("step-*")):
        title("Train on all local devices, and lose the machine half-way (SIGKILL to every process)")
        kill_at_first_checkpoint(train)
    command("The same command again: it resumes", *train)
    if not EXPORT.exists():
        command("Export", "export", RUN, "--output", EXPORT)
    command("A fresh process loads the export: a continuation", "generate", EXPORT, "--prompt", PROMPT)
    command("… and the held-out loss", "evaluate", EXPORT, "--dataset", DATASET)
    command("A page that tells what became of the run", "report", RUN, "--output", REPORT)
    title(f"Done in {time.monotonic() - started:.0f} s. Where things are")
    print(f"  report      {REPORT}   (open it in a browser; every run: globallocal runs)")
    print(f"  metrics     {page_of_run_folder(RUN) or 'MLflow has not been reached yet'}")
    print(f"  run         {RUN}   (config.yaml, checkpoints/, logs/)")
    print(f"  model       {EXPORT}   (transformers loads it)")
    print("  next        globallocal prepare --help, to do the same with your own text")
    return 0


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def line(arguments: list[object]) -> list[str]:
    words = [str(item) for item in arguments]
    print("$ globallocal " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "launch", *words]


def command(text: str, *arguments: object) -> None:
    title(text)
    code = subprocess.run(line(list(arguments))).returncode
    if code:
        sys.exit(code)


def kill_at_first_checkpoint(arguments: list[object]) -> None:
    """Start training; kill every process of it, without warning, once a checkpoint stands."""
    job = psutil.Popen(line(arguments))
    try:
        while job.poll() is None:
            if any((RUN / "checkpoints").glob("step-*")):
                time.sleep(2)  # some steps past the checkpoint, to be taken again
                return
            time.sleep(0.1)
        sys.exit(job.returncode or 1)
    finally:
        processes = [*job.children(recursive=True), job] if job.is_running() else []
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        print(f"killed {len(processes)} processes", flush=True)


if __name__ == "__main__":
    sys.exit(main())

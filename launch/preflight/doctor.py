"""Preflight: every problem of a run in one table, each with its remedy, before anything is spent."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError
from data_prep.manifest import check_shards
from launch.about import requirements
from launch.hosts import node
from launch.hosts.hostfile import read_hostfile
from launch.jobs.local import LocalRun, local_devices
from launch.jobs.session import Launch, run_session
from launch.preflight.estimate import Machine, estimate, gibibytes, model_of
from pipeline.checkpoints.space import checkpoint_bytes, free_bytes, readable, retained, start_problems
from pipeline.config import RunConfig, load_config, read_config
from pipeline.data.corpus import Corpus, open_corpus
from pipeline.data.loader import BatchLayout
from pipeline.settings.section import Unknown
from pipeline.settings.sections import DEFAULT_CACHE_FOLDER

Level = Literal["ok", "warning", "problem"]
TRACKING_SECONDS = 30
STEP_SECONDS = 600


@dataclass(frozen=True)
class Finding:
    """The result of one check; a problem or a warning says what to do."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """0: all is well; 1: warnings; 2: problems."""
    levels = {finding.level for finding in findings}
    return 2 if "problem" in levels else 1 if "warning" in levels else 0


SHOWN = ("torch", "deepspeed", "transformers", "mlflow")


def local_findings() -> Iterator[Finding]:
    """The checks of this machine, whatever the run."""
    yield from packages()
    yield devices()
    yield from operators()


def packages() -> Iterator[Finding]:
    """Installed versions against those that the project asks for."""
    wanted = [Requirement(line) for line in requirements()]
    shown = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", "problem", f"{requirement.name} is not installed", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                "packages",
                "problem",
                f"{requirement.name} {version}, needed: {requirement.specifier}",
                f"pip install '{requirement}'",
            )
        if requirement.name in SHOWN:
            shown.append(f"{requirement.name} {version}")
    yield Finding("packages", "ok", ", ".join(shown))


def devices() -> Finding:
    """Accelerators and their free memory, or cores."""
    import torch

    if local_devices() == 0:
        free = psutil.virtual_memory().available
        return Finding(
            "devices", "ok", f"CPU, {len(os.sched_getaffinity(0))} cores, {gibibytes(free)} GiB of memory free"
        )
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    free = min(device_free_bytes())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Finding(
        "devices",
        "ok",
        f"{torch.cuda.device_count()} × {', '.join(names)}, {gibibytes(free)} GiB free on the fullest, NCCL {nccl}",
    )


def device_free_bytes() -> list[int]:
    """Free memory of each device; for the CPU, this machine's."""
    import torch

    if local_devices() == 0:
        return [psutil.virtual_memory().available]
    return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]


def operators() -> Iterator[Finding]:
    """DeepSpeed's compiled operators: built before, for this very torch, or what compiles them at their first use."""
    import torch
    from deepspeed.git_version_info import installed_ops, torch_info

    built = sorted(name for name, there in installed_ops.items() if there)
    version = ".".join(torch.__version__.split(".")[:2])
    if built and torch_info.get("version") not in (None, "0.0", version):
        yield Finding(
            "operators",
            "problem",
            f"DeepSpeed's operators were built for torch {torch_info['version']}, installed is {torch.__version__}",
            "pip install --force-reinstall --no-cache-dir --no-build-isolation deepspeed",
        )
    yield from cuda_toolkit() if torch.version.cuda else ()
    missing = [name for name in ("ninja", "g++") if shutil.which(name, path=search_path()) is None]
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
    if built:
        yield Finding("operators", "ok", f"built before: {', '.join(built)}")
    elif missing:
        yield Finding(
            "operators",
            "warning",
            f"{' and '.join(missing)} not found; DeepSpeed compiles with them what offloading the optimizer needs",
            "pip install ninja; apt install g++",
        )
    else:
        yield Finding("operators", "ok", f"ninja and g++ compile what offloading needs, at its first use, into {cache}")


def cuda_toolkit() -> Iterator[Finding]:
    """The compiler's CUDA against torch's: another major version builds operators that cannot be loaded."""
    import torch
    from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version

    try:
        major, minor = installed_cuda_version()
    except (MissingCUDAException, OSError):
        return  # none there: nothing can be compiled, and what was built before needs none
    if str(major) != str(torch.version.cuda).split(".")[0]:
        yield Finding(
            "operators",
            "problem",
            f"CUDA toolkit {major}.{minor}, but torch was built for CUDA {torch.version.cuda}",
            f"install toolkit {torch.version.cuda} and set CUDA_HOME, or the torch for CUDA {major}",
        )


def search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def run_findings(path: Path, overrides: Sequence[str], ranks: int) -> Iterator[Finding]:
    """The run's settings against the dataset, the batch, the memory, the disk and the tracking store."""
    try:
        read = read_config(path, overrides)
    except UserError as error:
        yield from problems("config", error)
        return
    config = read.config
    if read.problems:
        yield from problems("config", UserError(read.problems))
    else:
        yield Finding("config", "ok", f"{path}: run {config.run.name} in {config.run_folder}")
    yield from guarded("batch", lambda: [batch(config, ranks)])
    yield from guarded("dataset", lambda: data(config, open_corpus(config.data)))
    yield from guarded("deepspeed", lambda: [deepspeed_json(config, ranks)])
    yield from guarded("memory", lambda: [memory(config, ranks)])
    yield from guarded("disk", lambda: [disk(config, ranks)])
    yield from guarded("mlflow", lambda: [tracking(config)])


def run_folder(path: Path | None, overrides: Sequence[str]) -> Path | None:
    """None without a run file, or where it does not tell; why, `run_findings` says."""
    try:
        return read_config(path, overrides).config.run_folder if path else None
    except (UserError, Unknown):
        return None


def slots(hostfile: Path) -> int:
    """Ranks of a hostfile; 0 where it cannot be read, which is said elsewhere."""
    try:
        return sum(read_hostfile(hostfile).values())
    except UserError:
        return 0


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What is found; problems that are raised become findings, and so does what a wrong setting hides."""
    try:
        yield from look()
    except UserError as error:
        yield from problems(check, error)
    except Unknown as cause:
        yield Finding(check, "warning", f"not checked until {cause.what} is right", "mend it, and run doctor again")


def problems(check: str, error: UserError) -> Iterator[Finding]:
    for line in error.problems:
        found, _, remedy = line.partition("; ")
        yield Finding(check, "problem", found, remedy)


def batch(config: RunConfig, ranks: int) -> Finding:
    layout = BatchLayout.of(config.training, ranks)
    tokens = f"{layout.global_batch_size * config.data.sequence_length:,} tokens per step"
    return Finding("batch", "ok", f"{layout}; {tokens}")


def data(config: RunConfig, corpus: Corpus) -> Iterator[Finding]:
    """The splits that the run reads: there, whole by size, long enough; and the tokenizer against the model."""
    from pipeline.export.load import build_model_config

    settings = config.data
    names = [name for name in (settings.train_split, config.evaluation.split) if name is not None]
    for part in corpus.parts:
        for name in names:
            split = part.dataset.split(name)
            found = f"{part.location}, {name}: {split.tokens:,} tokens in {split.num_shards:,} shards"
            if part.is_remote:
                yield Finding("dataset", "ok", f"{found}, hashed when they are downloaded")
                continue
            faults = check_shards(part.dataset, name, range(split.num_shards), hashes=False)
            for fault in faults:
                yield Finding("dataset", "problem", fault, f"globallocal verify {part.location}")
            if not faults:
                yield Finding("dataset", "ok", f"{found}, sizes right")
    corpus.source(settings.train_split, settings.sequence_length, config.order_seed, settings.window_tokens).close()
    if any(part.is_remote for part in corpus.parts):
        yield cache(config)
    model = build_model_config(config, corpus)
    yield Finding("vocabulary", "ok", f"tokenizer {corpus.tokenizer.vocab_size:,} ids, model {model.vocab_size:,}")


def cache(config: RunConfig) -> Finding:
    """Room on this node for the shards of remote datasets; what is cached already counts as room."""
    folder, budget = config.data.cache_dir or DEFAULT_CACHE_FOLDER, config.data.cache_bytes
    room = shutil.disk_usage(folder).free + sum(item.stat().st_size for item in folder.iterdir() if item.is_file())
    text = f"{gibibytes(budget)} GiB for cached shards, {gibibytes(room)} GiB free or in use by it in {folder}"
    if budget > room:
        return Finding("cache", "warning", text, "a smaller data.cache_bytes, or data.cache_dir on a larger disk")
    return Finding("cache", "ok", text)


def deepspeed_json(config: RunConfig, ranks: int) -> Finding:
    """The JSON against the run, and the operators that it needs."""
    from pipeline.engine.engine import check_machine, deepspeed_config, zero_stage

    precision, training = config.training.precision, config.training
    try:
        layout = BatchLayout.of(training, ranks)
    except UserError:  # said already; the rest of the JSON is looked at all the same
        layout = BatchLayout(training.global_batch_size, training.global_batch_size, 1)
    settings = deepspeed_config(config, layout, "bf16" if precision == "auto" else precision)
    check_machine(config, settings, ranks, local_devices() > 0)
    return Finding("deepspeed", "ok", f"{config.deepspeed.config}: ZeRO stage {zero_stage(settings)}")


def memory(config: RunConfig, ranks: int) -> Finding:
    """The forecast for one rank against what is free."""
    result = estimate(config, Machine(ranks=ranks))
    need = result.memory[result.zero_stage].total
    free = min(device_free_bytes())
    need *= ranks if local_devices() == 0 else 1
    text = f"{gibibytes(need)} GiB needed{' by all ranks' if local_devices() == 0 else ''}, {gibibytes(free)} GiB free"
    if need > free:
        smaller = "a smaller training.micro_batch_size, model.activation_checkpointing=full or a higher ZeRO stage"
        return Finding("memory", "problem", text, f"{smaller}; globallocal estimate shows each")
    if need > 0.9 * free:
        return Finding("memory", "warning", text, "little room is left: a smaller training.micro_batch_size is safer")
    return Finding("memory", "ok", text)


def disk(config: RunConfig, ranks: int) -> Finding:
    """Room for the checkpoints that retention keeps, and the one being written: what the run asks for before step 0."""
    import torch

    from pipeline.engine.engine import has_bf16

    result, precision = estimate(config, Machine()), config.training.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(torch.device("cuda" if local_devices() else "cpu")) else "fp32"
    one_bytes = checkpoint_bytes(model_of(config), config.optimizer.name, result.zero_stage, precision, ranks)
    count = retained(config.retention, result.steps, config.checkpoint.interval_steps)
    folder = config.run_folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("disk", "problem", f"{folder} cannot be written", "choose run.output_dir where you may write")
    lines = start_problems(config.checkpoints, one_bytes, count)
    if lines:
        raise UserError(lines)
    free = readable(free_bytes(folder))
    return Finding("disk", "ok", f"up to {count} checkpoints of about {readable(one_bytes)}, {free} free in {folder}")


def tracking(config: RunConfig) -> Finding:
    """MLflow takes a run, or says within a bound why not."""
    if not config.tracking.enabled:
        return Finding("mlflow", "ok", "tracking.enabled is false")
    from pipeline.tracking.store import experiment_of, tracking_uri

    uri, experiment = tracking_uri(config.tracking.uri), experiment_of(config.tracking)
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    remedy = "start the server, set MLFLOW_TRACKING_URI, or tracking.enabled=false"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch.preflight.tracking_probe", uri, experiment.name, experiment.id],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TRACKING_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Finding("mlflow", "warning", f"{uri}: no answer within {TRACKING_SECONDS} s", remedy)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Finding("mlflow", "warning", f"{uri}: {reason[0][:200]}", remedy)
    return Finding("mlflow", "ok", f"{uri}: a run was written, and deleted again")


STEP_OVERRIDES = (
    "training.max_steps=1",
    "training.max_epochs=null",
    "tracking.enabled=false",
    "optimizer.warmup_steps=0",
    "health.spike_action=none",
    "checkpoint.keep_best=0",
    "evaluation.split=null",
    "evaluation.prompts=[]",
    "data.verify=none",
    "checkpoint.resume=none",
)


def step(path: Path, overrides: Sequence[str], processes: int | None) -> Finding:
    """One real optimizer step of the run itself, saved and thrown away."""
    config = load_config(path, overrides)
    root = config.run_folder.absolute().parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root) as folder:
        extra = (*overrides, *STEP_OVERRIDES, f"run.output_dir={folder}")
        run = LocalRun(path, extra, load_config(path, extra), processes)
        job = run.job(node.free_port())
        log = Path(tempfile.gettempdir()) / f"globallocal-doctor-{os.getpid()}.log"
        ended = run_session(
            Launch(job.command, job.whole_environment(), log, 0.0, echo=False, limit_seconds=STEP_SECONDS)
        )
        if ended.stopped_by is signal.SIGINT:
            raise KeyboardInterrupt
    text = log.read_text(errors="replace")
    if ended.code:
        return Finding("step", "problem", last_error(text, ended.code), f"the whole output is in {log}")
    log.unlink()
    return Finding("step", "ok", "one step of the run was taken, saved and thrown away")


def last_error(text: str, code: int) -> str:
    """The line of a failed job's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if "error: " in line or "Error: " in line:
            return line
    return lines[-1] if lines else f"exit code {code}"


def show(findings: Sequence[Finding], console: Console) -> None:
    """All findings in one table, problems in red."""
    table = Table(show_lines=False)
    for column in ("check", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    for finding in findings:
        table.add_row(finding.check, f"[{styles[finding.level]}]{finding.level}[/]", finding.found, finding.remedy)
    console.print(table)


def to_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"exit_code": exit_code(findings), "findings": [asdict(item) for item in findings]}, indent=2)

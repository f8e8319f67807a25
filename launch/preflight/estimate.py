"""An estimate of what a run will need, before it is paid for: parameters, memory per rank, operations, time, money."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError
from launch.preflight.measured import Expected, expected
from launch.preflight.memory import ModelSize, RankMemory, measure, rank_memory
from model.configuration_globallocal import GlobalLocalConfig
from model.presets_globallocal import PRESETS
from pipeline.config import RunConfig, validate
from pipeline.data.corpus import Corpus, open_corpus
from pipeline.data.loader import BatchLayout
from pipeline.metrics.duration import duration
from pipeline.metrics.utilisation import PEAK_TERAFLOPS, PEAK_TERAFLOPS_FP16, card, peak_teraflops
from pipeline.settings.section import counted

TOKENS_PER_PARAMETER = 20
"""Training tokens that pay best for a given amount of computing, for transformers (arXiv:2203.15556)."""


@dataclass(frozen=True)
class Machine:
    """The devices that a run is to run on.

    Attributes:
        ranks: devices, over all nodes.
        card: its kind, as in `PEAK_TERAFLOPS`, which gives the peak rate.
        teraflops: peak rate of one device in 10^12 operations per second, in the precision of the run; the card's where
            absent.
        utilisation: part of that rate that training reaches (MFU); as `measured.py` has it where absent.
        price_per_hour: of one device, in whatever currency.
    """

    ranks: int = 1
    card: str | None = None
    teraflops: float | None = None
    utilisation: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Estimate:
    """All figures of one run on one machine; bytes, tokens, operations, seconds."""

    name: str
    notes: list[str]
    parameters: dict[str, int]
    pool_elements: int
    receptive_field_tokens: int
    sequence_length_tokens: int
    flops_per_token: float
    precision: str
    optimizer: str
    zero_stage: int
    memory: dict[int, RankMemory]
    ranks: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float | None
    teraflops: float | None
    utilisation: float
    utilisation_measured: bool
    utilisation_source: str
    tokens_per_second: float | None
    seconds: float | None
    price: float | None

    def to_json(self) -> str:
        values = asdict(self)
        values["memory"] = {stage: {**asdict(item), "total": item.total} for stage, item in self.memory.items()}
        return json.dumps(values, indent=2)


def preset_config(preset: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run of the preset alone: its own sequence length, as many tokens as pay best."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; known: {', '.join(PRESETS)}")
    model = GlobalLocalConfig.from_preset(preset)
    length = model.max_position_embeddings
    batch = 16
    tokens = TOKENS_PER_PARAMETER * sum(model.parameter_counts().values())
    values: dict[str, Any] = {
        "run": {"name": preset},
        "model": {"preset": preset},
        "data": {"dataset": "none", "sequence_length": length},
        "training": {
            "max_steps": max(1, round(tokens / (batch * length))),
            "global_batch_size": batch,
            "micro_batch_size": 1,
        },
    }
    return validate(_with_overrides(values, overrides), f"--preset {preset}")


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]


def estimate(config: RunConfig, machine: Machine) -> Estimate:
    """All figures of a run.

    Raises:
        UserError: a model, a batch or a DeepSpeed JSON that cannot work.
    """
    notes: list[str] = []
    corpus = _corpus(config, notes)
    model = _model(config, corpus)
    layout = BatchLayout.of(config.training, machine.ranks)
    zero = _zero(config)
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16"
        notes.append("precision auto: taken as bf16; a CPU without bf16 units trains in fp32, at twice the memory")
    size = measure(
        model, config.training.micro_batch_size, config.data.sequence_length, precision, config.optimizer.name
    )
    accumulates = layout.gradient_accumulation_steps > 1
    tokens_per_step = config.training.global_batch_size * config.data.sequence_length
    samples = _samples(config, corpus)
    steps = _steps(config, samples, notes)
    flops = model.flops_per_token(config.data.sequence_length)
    peak = _peak(machine, precision)
    mfu = _utilisation(config, machine, flops)
    rate = peak and machine.ranks * peak * 1e12 * mfu.mfu / flops
    run_samples = config.training.samples(steps)
    tokens = run_samples * config.data.sequence_length
    seconds = rate and tokens / rate
    return Estimate(
        name=config.run.name,
        notes=notes,
        parameters=model.parameter_counts(),
        pool_elements=size.frozen,
        receptive_field_tokens=model.receptive_field,
        sequence_length_tokens=config.data.sequence_length,
        flops_per_token=flops,
        precision=precision,
        optimizer=config.optimizer.name,
        zero_stage=int(zero.get("stage", 0)),
        memory={stage: _stage_memory(size, stage, machine, precision, zero, accumulates) for stage in range(4)},
        ranks=machine.ranks,
        micro_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=layout.gradient_accumulation_steps,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=tokens,
        epochs=run_samples / samples if samples else None,
        teraflops=peak,
        utilisation=mfu.mfu,
        utilisation_measured=mfu.measured,
        utilisation_source=mfu.source,
        tokens_per_second=rate,
        seconds=seconds,
        price=seconds and machine.price_per_hour and seconds / 3600 * machine.ranks * machine.price_per_hour,
    )


def _peak(machine: Machine, precision: str) -> float | None:
    if machine.teraflops or machine.card is None:
        return machine.teraflops
    peak = peak_teraflops(machine.card, precision)
    if peak is None:
        known = ", ".join(sorted(PEAK_TERAFLOPS | PEAK_TERAFLOPS_FP16))
        raise UserError(
            f"--card {machine.card}: no peak rate in {precision} is known; give --teraflops, or one of {known}"
        )
    return peak


def _utilisation(config: RunConfig, machine: Machine, flops_per_token: float) -> Expected:
    if machine.utilisation:
        return Expected(machine.utilisation, False, "as given by --utilisation")
    return expected(config.model.preset, flops_per_token, card(machine.card or ""))


def _stage_memory(
    size: ModelSize, stage: int, machine: Machine, precision: str, zero: Mapping[str, Any], accumulates: bool
) -> RankMemory:
    """The run's own stage with its offloading; the other stages as the plain alternatives."""
    own = stage == int(zero.get("stage", 0))
    plain = {key: value for key, value in zero.items() if not key.startswith("offload_")}
    knobs = zero if own else plain
    return rank_memory(size, stage, machine.ranks, precision, knobs, accumulates=accumulates)


def _corpus(config: RunConfig, notes: list[str]) -> Corpus | None:
    try:
        return open_corpus(config.data)
    except UserError as error:
        if config.data.dataset != "none":
            notes.append(f"dataset not read ({error.problems[0]}): the preset's vocabulary is assumed")
        return None


def model_of(config: RunConfig) -> GlobalLocalConfig:
    """The run's model; with the preset's vocabulary where the dataset cannot be read."""
    return _model(config, _corpus(config, []))


def _model(config: RunConfig, corpus: Corpus | None) -> GlobalLocalConfig:
    fixed: dict[str, Any] = {"max_position_embeddings": config.data.sequence_length}
    if corpus is not None:
        fixed["vocab_size"] = corpus.tokenizer.vocab_size
    return config.model.build(**fixed)


def _zero(config: RunConfig) -> Mapping[str, Any]:
    from pipeline.engine.deepspeed_json import read_deepspeed_json

    section: Mapping[str, Any] = read_deepspeed_json(config.deepspeed.config).get("zero_optimization", {})
    return section


def _samples(config: RunConfig, corpus: Corpus | None) -> int | None:
    if corpus is None:
        return None
    splits = [part.dataset.split(config.data.train_split) for part in corpus.parts]
    return sum((split.tokens - 1) // config.data.sequence_length for split in splits)


def _steps(config: RunConfig, samples: int | None, notes: list[str]) -> int:
    if samples is None and config.training.max_steps is None:
        notes.append("training.max_epochs needs the dataset; one step is assumed")
        return 1
    return config.training.steps(samples or 0)


def show(result: Estimate, console: Console) -> None:
    """The estimate as tables for a person."""
    total = sum(result.parameters.values())
    parts = Table(title=f"{result.name}: {total:,} parameters, and a frozen pool of {result.pool_elements:,}")
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    parts.add_column("share", justify="right")
    for part, count in result.parameters.items():
        parts.add_row(part, f"{count:,}", f"{count / total:.1%}")
    console.print(parts)

    memory = Table(title=f"GiB per rank, {counted(result.ranks, 'rank')}, {result.precision}, {result.optimizer}")
    offloads = any(item.offloaded for item in result.memory.values())
    columns = ("ZeRO", "weights", "grads", "optimizer", "buffers", "activations", "total")
    for column in (*columns, *(["offloaded"] if offloads else [])):
        memory.add_column(column, justify="right", no_wrap=True)
    for stage, item in result.memory.items():
        mark = " ←" if stage == result.zero_stage else ""
        cells = (item.weights, item.gradients, item.optimizer, item.buffers, item.activations, item.total)
        shown = [*cells, item.offloaded] if offloads else cells
        memory.add_row(f"{stage}{mark}", *(gibibytes(cell) for cell in shown))
    console.print(memory)
    for line in _sentences(result):
        console.print(line, highlight=False)


def gibibytes(count: int) -> str:
    return f"{count / 2**30:,.2f}"


def _sentences(result: Estimate) -> list[str]:
    samples = result.tokens_per_step // result.sequence_length_tokens
    covered = "covers" if result.receptive_field_tokens >= result.sequence_length_tokens else "does not cover"
    lines = [
        f"receptive field: {result.receptive_field_tokens:,} tokens; it {covered} "
        f"the sequence of {result.sequence_length_tokens:,}",
        f"step: {samples:,} samples = {result.micro_batch_size} micro-batch × {counted(result.ranks, 'rank')} × "
        f"{counted(result.gradient_accumulation_steps, 'accumulation step')} = {result.tokens_per_step:,} tokens",
        f"run: {result.steps:,} steps, {result.tokens:,} tokens"
        + (f", {result.epochs:.2f} epochs" if result.epochs else "")
        + f", {result.tokens / sum(result.parameters.values()):.1f} tokens a parameter",
        f"operations: {result.flops_per_token:.3g} per token, {result.flops_per_token * result.tokens:.3g} in all",
    ]
    if result.seconds and result.tokens_per_second:
        lines.append(
            f"time: {duration(result.seconds)} at {result.tokens_per_second:,.0f} tokens per second "
            f"({result.ranks} × {result.teraflops:g} TFLOP/s × MFU {result.utilisation:.3g})"
            + (f"; price {result.price:,.2f}" if result.price else "")
        )
        alone = "" if result.ranks == 1 else "; what the exchange between devices costs is not in it"
        lines.append(f"MFU: {result.utilisation_source}{alone}")
    else:
        lines.append("time: give --card, such as H100, or --teraflops, the peak rate of one device")
    return lines + [f"note: {note}" for note in result.notes]

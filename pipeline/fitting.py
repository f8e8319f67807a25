"""Whether a run's settings fit each other, the dataset, the DeepSpeed JSON and the machine: all problems at once.

`launch` asks before any rank starts; each rank asks again before it builds anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.folder import nearest_checkpoints
from pipeline.config import RunConfig, warmup_problem
from pipeline.context import RunContext
from pipeline.data.corpus import Corpus, open_corpus
from pipeline.data.loader import BatchLayout
from pipeline.data.samples import Source
from pipeline.distributed.world import World
from pipeline.engine.compilation import resolve_compile
from pipeline.engine.engine import check_machine, deepspeed_config, has_bf16, zero_stage
from pipeline.export.load import build_model_config
from pipeline.settings.section import short

Part = TypeVar("Part")


@dataclass(frozen=True)
class Fitted:
    """What the settings come to.

    Attributes:
        model: None where the dataset, which fixes the vocabulary, cannot be seen from here; likewise `source`.
        layout: None where the number of ranks is not known yet.
        steps: optimizer steps of the run; None without the dataset where they are counted in epochs.
        deepspeed: the merged configuration; empty without a layout.
        compiled: whether the model's blocks are compiled.
    """

    corpus: Corpus | None
    source: Source | None
    model: GlobalLocalConfig | None
    layout: BatchLayout | None
    steps: int | None
    deepspeed: dict[str, Any]
    compiled: bool

    def context(self, config: RunConfig, world: World, precision: str) -> RunContext:
        """What the parts of the run share; on a rank, where nothing is left open."""
        assert self.corpus is not None
        assert self.source is not None
        assert self.model is not None
        assert self.layout is not None
        assert self.steps is not None
        return RunContext(
            config=config,
            world=world,
            corpus=self.corpus,
            source=self.source,
            layout=self.layout,
            model=self.model,
            deepspeed=self.deepspeed,
            steps=self.steps,
            precision=precision,
            stage=zero_stage(self.deepspeed),
            compiled=self.compiled,
        )


def fit(
    config: RunConfig, ranks: int | None, precision: str, device: torch.device, *, dataset_is_here: bool = True
) -> Fitted:
    """
    Args:
        ranks: None where they are not known yet; what depends on them is then left out.
        precision: resolved, not `auto`.
        device: of a rank.
        dataset_is_here: False where only the ranks may be able to open it.

    Raises:
        UserError: one line for everything that does not fit.
    """
    problems: list[str] = []

    def part(make: Callable[[], Part]) -> Part | None:
        try:
            return make()
        except UserError as error:
            problems.extend(error.problems)
            return None

    training = config.training
    layout = None
    if ranks is not None:
        layout = part(lambda: BatchLayout(training.global_batch_size, training.micro_batch_size, int(ranks)))
    corpus = part(lambda: open_corpus(config.data))
    if corpus is None and not dataset_is_here:
        problems.clear()
        layout = part(lambda: BatchLayout(training.global_batch_size, training.micro_batch_size, ranks or 1))
    source = model = None
    if corpus is not None:
        opened = corpus
        source = part(lambda: _source(config, opened))
        model = part(lambda: build_model_config(config, opened))
    settings = part(lambda: deepspeed_config(config, layout, precision)) or {}
    if settings and ranks is not None:
        part(lambda: check_machine(config, settings, ranks, device.type == "cuda"))
    compiled = False
    if settings and model is not None:
        stage, policy = zero_stage(settings), model.activation_checkpointing
        compiled = bool(part(lambda: resolve_compile(training.compile, device, stage, policy)))
    steps = training.steps(source.num_samples) if source else training.max_steps
    if steps is not None:
        part(lambda: _check_steps(config, int(steps)))
    if model is not None:
        problems += memory_problems(config, model, ranks or 1, device)
    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and dataset_is_here and not Path(resume).is_dir():
        problems.append(f"checkpoint.resume: {resume}: no such folder; {nearest_checkpoints(Path(resume))}")
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return Fitted(corpus, source, model, layout, steps, settings, compiled)


def local_precision(config: RunConfig, device: torch.device) -> str:
    """`auto` as this machine alone would resolve it."""
    wanted = config.training.precision
    return wanted if wanted != "auto" else "bf16" if has_bf16(device) else "fp32"


def _check_steps(config: RunConfig, steps: int) -> None:
    """Raises UserError where the warm-up, or what is to be profiled, does not fit into so many steps."""
    problems = [line for line in (warmup_problem(config.optimizer.warmup_steps, steps),) if line]
    try:
        config.training.check_profile(steps)
    except ValueError as error:
        problems.append(f"training: {error}")
    if problems:
        raise UserError(problems)


def _source(config: RunConfig, corpus: Corpus) -> Source:
    data, problems = config.data, []
    for setting, name in (("data.train_split", data.train_split), ("evaluation.split", config.evaluation.split)):
        for part in corpus.parts if name else ():
            if name not in part.dataset.manifest.splits:
                there = ", ".join(part.dataset.manifest.splits)
                problems.append(f"{setting} = {short(name)}: {part.location} has none of that name; known: {there}")
    if problems:
        raise UserError(problems)
    return corpus.source(data.train_split, data.sequence_length, config.order_seed, data.window_tokens)


def memory_problems(config: RunConfig, model: GlobalLocalConfig, ranks: int, device: torch.device) -> list[str]:
    """A line where a rank needs more memory than there is, however it is spread; `estimate` counts all of it."""
    parameters = sum(model.parameter_counts().values())
    tokens = config.training.micro_batch_size * config.data.sequence_length
    states = max(4 * parameters, 12 * parameters // ranks) + 2 * model.pool_size * model.pool_dim
    activations = tokens * (8 + 2 * model.hidden_size * model.num_hidden_layers)
    there = psutil.virtual_memory().total
    if device.type == "cuda":
        there += torch.cuda.get_device_properties(device).total_memory
    if states + activations <= there:
        return []
    return [
        f"the model of {parameters:,} parameters, with {tokens:,} tokens at once, needs "
        f"{(states + activations) / 2**30:,.0f} GiB per rank or more, this machine has {there / 2**30:,.0f}; lower "
        "model.hidden_size, model.num_hidden_layers, "
        "model.pool_size, training.micro_batch_size or data.sequence_length"
    ]

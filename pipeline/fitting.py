"""Whether a run's settings fit each other, the dataset, the DeepSpeed JSON and the machine: all problems at once.

`launch` asks before any rank starts; each rank asks again before it builds anything.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.folder import nearest_checkpoints
from pipeline.checkpoints.space import checkpoint_bytes, retained, start_problems
from pipeline.config import RunConfig, schedule_problem
from pipeline.context import RunContext
from pipeline.data.corpus import Corpus, open_corpus
from pipeline.data.loader import BatchLayout
from pipeline.data.samples import Source
from pipeline.distributed.world import World
from pipeline.engine.compilation import resolve_compile
from pipeline.engine.engine import (
    check_knobs,
    check_machine,
    check_precision,
    deepspeed_config,
    has_bf16,
    zero_stage,
)
from pipeline.export.initial import check_initial, initial_weights
from pipeline.export.load import build_model_config
from pipeline.settings.section import Unknown, short

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


class Round:
    """One look at everything: all that is wrong, and what cannot be told because of it.

    Attributes:
        problems: one line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        self._causes: dict[str, str] = {}

    def part(self, what: str, make: Callable[[], Part]) -> Part | None:
        """The part, or None where it is wrong or cannot be told; `what` names it in a line."""
        try:
            return make()
        except UserError as error:
            self.problems += error.problems
        except Unknown as cause:
            self._causes[what] = self._causes.get(cause.what, cause.what)
        return None

    def end(self) -> None:
        """Raises UserError where anything was wrong."""
        if self.problems:
            lines = list(dict.fromkeys(self.problems))
            for cause in dict.fromkeys(self._causes.values()):
                open_ = [what for what, other in self._causes.items() if other == cause]
                lines.append(f"not checked yet: {', '.join(open_)}; these need {cause}, which is wrong")
            raise UserError(lines)


def have(part: Part | None, what: str) -> Part:
    """Raises Unknown where the part is not there."""
    if part is None:
        raise Unknown(what)
    return part


DATASET, SAMPLES, MODEL, KNOBS, STEPS = "the dataset", "the samples", "the model", "the DeepSpeed JSON", "the steps"


def fit(
    config: RunConfig,
    ranks: int | None,
    precision: str | None,
    device: torch.device,
    *,
    wrong: Sequence[str] = (),
    disk: bool = False,
) -> Fitted:
    """
    Args:
        config: a setting may be missing where `wrong` says why; what hangs on it is then named, and not guessed.
        ranks: None for a job on hosts that are not asked here: what depends on them is left out, and the dataset may
            be one that only they can open.
        precision: resolved, not `auto`; None: as this machine alone resolves it.
        device: of a rank.
        wrong: problems that are known before.
        disk: look at it too, as the first rank of a job does.

    Raises:
        UserError: one line for everything that does not fit.
    """
    look = Round(wrong)
    layout = look.part("the batch", lambda: _layout(config, ranks or 1))
    if ranks is None:
        layout = None
    corpus = look.part(DATASET, lambda: open_corpus(config.data)) if ranks is not None else _visible(config)
    source = model = None
    if corpus is not None or ranks is not None:
        look.part("the splits", lambda: _check_splits(config, have(corpus, DATASET)))
        source = look.part(SAMPLES, lambda: _source(config, have(corpus, DATASET)))
        model = look.part(MODEL, lambda: build_model_config(config, have(corpus, DATASET)))
    if model is None:
        look.part("the model's sizes", lambda: _check_sizes(config, ranks or 1, device))
    resolved = look.part("the precision", lambda: precision or local_precision(config, device))
    settings = look.part(KNOBS, lambda: deepspeed_config(config, layout, have(resolved, "training.precision")))
    if settings is None:
        look.part("the DeepSpeed JSON by itself", lambda: check_knobs(config.deepspeed.config))
        look.part("the machine", lambda: check_precision(config.training.precision))
    if ranks is not None:
        look.part("the machine", lambda: check_machine(config, have(settings, KNOBS), ranks, device.type == "cuda"))
    compiled = look.part("compiling", lambda: _compiled(config, have(settings, KNOBS), model, device))
    steps = look.part(STEPS, lambda: _steps(config, source))
    if model is not None:
        look.part("memory", lambda: _check_memory(config, have(model, MODEL), ranks or 1, device))
    if disk and ranks is not None:
        look.part("the disk", lambda: _check_disk(config, model, settings, steps, str(resolved), ranks))
    if ranks is not None:
        look.part("checkpoint.resume", lambda: _check_resume(config))
        look.part("training.init_from", lambda: _check_initial(config, have(model, MODEL), have(corpus, DATASET)))
    look.end()
    return Fitted(corpus, source, model, layout, steps, settings or {}, bool(compiled))


def _layout(config: RunConfig, ranks: int) -> BatchLayout:
    return BatchLayout.of(config.training, ranks)


def _visible(config: RunConfig) -> Corpus | None:
    """The dataset where it can be opened from here."""
    try:
        return open_corpus(config.data)
    except (UserError, Unknown):
        return None


def local_precision(config: RunConfig, device: torch.device) -> str:
    """`auto` as this machine alone would resolve it."""
    wanted = config.training.precision
    return wanted if wanted != "auto" else "bf16" if has_bf16(device) else "fp32"


def _check_splits(config: RunConfig, corpus: Corpus) -> None:
    problems = []
    for setting, name in (("data.train_split", config.data.train_split), ("evaluation.split", config.evaluation.split)):
        for part in corpus.parts if name else ():
            if name not in part.dataset.manifest.splits:
                there = ", ".join(part.dataset.manifest.splits)
                problems.append(f"{setting} = {short(name)}: {part.location} has none of that name; known: {there}")
    if problems:
        raise UserError(problems)


def _source(config: RunConfig, corpus: Corpus) -> Source:
    data = config.data
    if any(data.train_split not in part.dataset.manifest.splits for part in corpus.parts):
        raise Unknown("data.train_split")
    return corpus.source(data.train_split, data.sequence_length, config.order_seed, data.window_tokens)


def _check_sizes(config: RunConfig, ranks: int, device: torch.device) -> None:
    """Of a model whose dataset, which fixes the vocabulary, is not known: all but its embedding."""
    model = config.model.build(vocab_size=1) if "vocab_size" not in config.model.overrides else config.model.build()
    _check_memory(config, model, ranks, device, beside=" and an embedding")


def _compiled(
    config: RunConfig, settings: dict[str, Any], model: GlobalLocalConfig | None, device: torch.device
) -> bool:
    if model is None:
        return False
    return resolve_compile(config.training.compile, device, zero_stage(settings), model.activation_checkpointing)


def _steps(config: RunConfig, source: Source | None) -> int:
    """Steps of the run. Raises UserError where its schedule, or what is to be profiled, does not fit into them."""
    training = config.training
    steps = (
        training.max_steps if training.max_steps is not None or source is None else training.steps(source.num_samples)
    )
    if steps is None:
        raise Unknown(SAMPLES)
    profile = training.profile_problem(steps)
    schedule = schedule_problem(config.optimizer, steps)
    problems = [line for line in (schedule, f"training: {profile}" if profile else None) if line]
    if problems:
        raise UserError(problems)
    return steps


def _check_resume(config: RunConfig) -> None:
    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise UserError(f"checkpoint.resume: {resume}: no such folder; {nearest_checkpoints(Path(resume))}")


def _check_initial(config: RunConfig, model: GlobalLocalConfig, corpus: Corpus) -> None:
    if folder := initial_weights(config):
        check_initial(folder, model, corpus.tokenizer.sha256)


def _check_disk(
    config: RunConfig,
    model: GlobalLocalConfig | None,
    settings: dict[str, Any] | None,
    steps: int | None,
    precision: str,
    ranks: int,
) -> None:
    """Raises UserError where the run folder cannot be written, or has no room for the checkpoints that are kept."""
    folder = config.run_folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; choose a run.output_dir that you may write, with room")
    built, stage = have(model, MODEL), zero_stage(have(settings, KNOBS))
    one_bytes = checkpoint_bytes(built, config.optimizer.name, stage, precision, ranks)
    count = retained(config.retention, have(steps, STEPS), config.checkpoint.interval_steps)
    if problems := start_problems(config.checkpoints, one_bytes, count):
        raise UserError(problems)


def _check_memory(
    config: RunConfig, model: GlobalLocalConfig, ranks: int, device: torch.device, beside: str = ""
) -> None:
    """Raises UserError where a rank needs more memory than there is, however it is spread; `estimate` counts all."""
    parameters = sum(model.parameter_counts().values())
    tokens = config.training.micro_batch_size * config.data.sequence_length
    states = max(4 * parameters, 12 * parameters // ranks) + 2 * model.pool_size * model.pool_dim
    activations = tokens * (8 + 2 * model.hidden_size * model.num_hidden_layers)
    there = psutil.virtual_memory().total
    if device.type == "cuda":
        there += torch.cuda.get_device_properties(device).total_memory
    if states + activations > there:
        raise UserError(
            f"the model of {parameters:,} parameters{beside}, with {tokens:,} tokens at once, needs "
            f"{(states + activations) / 2**30:,.0f} GiB per rank or more, this machine has {there / 2**30:,.0f}; lower "
            "model.hidden_size, model.num_hidden_layers, "
            "model.pool_size, training.micro_batch_size or data.sequence_length"
        )

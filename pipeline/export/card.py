"""The model card: what a stranger judges an exported model by."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf

from data_prep.errors import UserError
from pipeline.checkpoints.folder import CheckpointState
from pipeline.config import RunConfig, validate
from pipeline.data.corpus import Corpus, Part, open_corpus
from pipeline.metrics.duration import duration

if TYPE_CHECKING:
    from model.configuration_globallocal import GlobalLocalConfig
    from pipeline.evaluation.figures import Evaluation, Figures

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for hidden matrices and AdamW"}
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
LICENCES = {
    "sample": "CC BY-SA 3.0 and GFDL (English Wikipedia)",
    "wikitext-103": "CC BY-SA 3.0 and GFDL (English Wikipedia)",
}
"""Of the sources whose text the project knows; the others' owners must be asked."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        states, folders: of the checkpoints, the newest first; several where their mean is exported.
        repository: USER/NAME on the hub; None where the folder stays here.
    """

    states: Sequence[CheckpointState]
    folders: Sequence[Path]
    model: "GlobalLocalConfig"
    dtype: str
    repository: str | None

    @property
    def state(self) -> CheckpointState:
        return self.states[0]

    @cached_property
    def run(self) -> RunConfig:
        return validate(self.state.config, "the checkpoint's state.json")

    @cached_property
    def corpus(self) -> Corpus | None:
        """What the run was trained on, where it can still be opened."""
        try:
            corpus = open_corpus(self.run.data)
        except UserError:
            return None
        return corpus if corpus.dataset_id == self.state.dataset_id else None

    @property
    def evaluation(self) -> "Evaluation | None":
        """Of these very weights: not of one checkpoint where the mean of several is exported."""
        return self.state.evaluation if len(self.states) == 1 else None


def model_card(facts: CardFacts) -> str:
    """README.md of the export: metadata with a model index, and a page in plain words."""
    figures = list(figure_rows(facts))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["type"],
            dataset_name=row["dataset"],
            dataset_split=facts.run.evaluation.split,
            metric_type=row["metric"],
            metric_name=row["name"],
            metric_value=row["value"],
            metric_args={"per": row["per"]},
        )
        for row in figures
    ]
    name = facts.run.run.name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["globallocal", "custom_code"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    counts = facts.model.parameter_counts()
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        name=name,
        parameters=number(sum(counts.values())),
        parts={part.replace("_", " "): f"{count:,}" for part, count in counts.items() if count},
        pool=number(facts.model.pool_size * facts.model.pool_dim),
        dilations=[facts.model.dilations_of_layer(layer) for layer in range(facts.model.num_hidden_layers)],
        datasets=list(dataset_rows(facts)),
        training=training_rows(facts),
        figures=figures,
        settings=OmegaConf.to_yaml(OmegaConf.create(facts.state.config)),
        lineage=lineage_rows(facts),
        tokens=number(facts.state.consumed_tokens),
        tokens_per_parameter=figure(facts.state.consumed_tokens / sum(counts.values())),
    )
    return str(card)


def number(count: float) -> str:
    """1,234 stays; 2,581,070 → 2.58 million (2,581,070)."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {word} ({count:,.0f})"
    return f"{count:,.0f}"


def figure(value: float) -> str:
    """Four digits that count; no powers of ten."""
    return f"{value:.4g}" if 0.0001 <= abs(value) < 1000 else f"{value:,.0f}"


def dataset_rows(facts: CardFacts) -> Iterator[dict[str, str]]:
    for part in facts.corpus.parts if facts.corpus else ():
        source = part.dataset.manifest.source
        split = part.dataset.manifest.splits[facts.run.data.train_split]
        yield {
            "name": dataset_name(part),
            "licence": LICENCES.get(source.name, "not recorded; ask the owner of the text"),
            "documents": number(split.documents),
            "bytes": number(split.source_bytes),
            "tokens": number(split.tokens),
            "share": f"{100 * float(part.share):.3g} %",
            "dataset_id": part.dataset.dataset_id,
        }


def dataset_name(part: Part) -> str:
    """The source, and on the hub the dataset's id there."""
    source = part.dataset.manifest.source
    named = source.settings.get("dataset")
    return f"{source.name} {named}" if named else f"{source.name} ({part.name})"


def training_rows(facts: CardFacts) -> dict[str, str]:
    state, run = facts.state, facts.run
    optimizer, training = run.optimizer, run.training
    shape = "one process" if state.world_size <= 1 else f"{state.world_size} processes"
    rows = {
        "optimizer steps": f"{state.step:,}",
        "training tokens": number(state.consumed_tokens),
        "global batch": f"{', then '.join(f'{size:,}' for size in training.batch_sizes)} samples of "
        f"{run.data.sequence_length:,} tokens",
        "optimizer": f"{OPTIMIZERS[optimizer.name]}, peak learning rate {optimizer.learning_rate:g}, betas "
        f"{optimizer.betas[0]:g} and {optimizer.betas[1]:g}, weight decay {optimizer.weight_decay:g} (matrices only)",
        "schedule": f"linear warm-up over {optimizer.warmup_steps:,} steps, then {optimizer.schedule} down to "
        f"{optimizer.min_learning_rate_ratio:g} of the peak",
        "gradient norm": f"at most {optimizer.max_gradient_norm:g}",
        "precision": f"{state.precision}; weights and moments in fp32",
        "machine": f"{shape}, DeepSpeed ZeRO stage {state.zero_stage}",
        "versions": ", ".join(f"{name} {version}" for name, version in state.versions.items()),
    }
    if facts.corpus:
        split = sum(part.dataset.manifest.splits[run.data.train_split].tokens for part in facts.corpus.parts)
        rows["passes over the data"] = figure(state.consumed_tokens / split)
    if seconds := state.seconds.get("training"):
        rows["time"] = duration(seconds)
    return rows


def figure_rows(facts: CardFacts) -> Iterator[dict[str, Any]]:
    """One per figure that is finite: of all held-out text, then of each dataset of a mixture."""
    if facts.evaluation is None:
        return
    held_out = facts.evaluation.held_out
    parts = {part.name: part for part in facts.corpus.parts} if facts.corpus else {}
    alone = next(iter(parts.values())) if len(parts) == 1 else None
    yield from _figures(held_out.total, dataset_name(alone) if alone else "held-out text", alone, facts)
    for name, own in held_out.by_dataset.items():
        yield from _figures(own, name, parts.get(name), facts)


def _figures(figures: "Figures", dataset: str, part: Part | None, facts: CardFacts) -> Iterator[dict[str, Any]]:
    split = part.dataset.manifest.splits.get(facts.run.evaluation.split or "") if part else None
    words = f"word and line end ({number(split.words + split.lines)} in the split)" if split else "word and line end"
    size = f"UTF-8 byte ({number(split.source_bytes)} in the split)" if split else "UTF-8 byte"
    tokens = f"token ({number(figures.tokens)} measured)" if figures.tokens else "token"
    for name, metric, value, per in (
        ("loss in nats", "loss", figures.loss, tokens),
        ("token perplexity", "perplexity", figures.token_perplexity, tokens),
        ("word perplexity", "word_perplexity", figures.word_perplexity, words),
        ("bits per byte", "bits_per_byte", figures.bits_per_byte, size),
    ):
        if math.isfinite(value):
            yield {
                "dataset": dataset,
                "type": part.dataset.manifest.source.settings.get("dataset", "text") if part else "text",
                "metric": metric,
                "name": name,
                "value": float(f"{value:.5g}"),
                "shown": figure(value),
                "per": per,
            }


def lineage_rows(facts: CardFacts) -> dict[str, str]:
    state = facts.state
    steps = ", ".join(f"{one.step:,}" for one in facts.states)
    rows = {
        "run": facts.run.run.name,
        "checkpoint": f"step {steps}" if len(facts.states) == 1 else f"mean of the weights after steps {steps}",
        "weights written as": facts.dtype,
        "dataset_id": f"`{state.dataset_id}`",
        "tokenizer sha256": f"`{state.tokenizer_sha256}`",
    }
    if state.begun_from:
        rows["began with"] = f"the weights in `{state.begun_from.folder}`"
    if state.mlflow_run_id:
        rows["MLflow run"] = f"`{state.mlflow_run_id}`"
    return rows

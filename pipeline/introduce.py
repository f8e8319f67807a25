"""What a run is and what to expect of it, in a few aligned lines before its first step."""

from collections.abc import Iterator, Sequence

from pipeline.checkpoints.space import checkpoint_bytes, readable, retained
from pipeline.config import RunConfig
from pipeline.engine.engine import zero_stage
from pipeline.fitting import Fitted

LABEL_WIDTH = 8
PARTS_A_LINE = 4


def introduce(
    config: RunConfig, fitted: Fitted, ranks: int, precision: str, device: str, groups: Sequence[str]
) -> list[str]:
    """
    Args:
        groups: a line for each group of parameters of the optimizer.
    """
    return [f"{label:<{LABEL_WIDTH}}{line}" for label, line in _facts(config, fitted, ranks, precision, device, groups)]


def _facts(
    config: RunConfig, fitted: Fitted, ranks: int, precision: str, device: str, groups: Sequence[str]
) -> Iterator[tuple[str, str]]:
    corpus, source, model, layout, steps = fitted.corpus, fitted.source, fitted.model, fitted.layout, fitted.steps
    assert corpus is not None
    assert source is not None
    assert model is not None
    assert layout is not None
    assert steps is not None
    length, stage = config.data.sequence_length, zero_stage(fitted.deepspeed)
    yield "run", f"{config.run.name} in {config.run_folder}"
    for number, line in enumerate(corpus.describe(config.data.train_split)):
        yield "" if number else "data", line
    parts = model.parameter_counts()
    total = sum(parts.values())
    yield "model", f"{config.model.preset}, {total:,} parameters, {model.vocab_size:,} ids"
    shares = [f"{name.replace('_', '-')} {count:,}" for name, count in sorted(parts.items(), key=lambda item: -item[1])]
    for begin in range(0, len(shares), PARTS_A_LINE):
        yield "", "  ".join(f"{share:<25}" for share in shares[begin : begin + PARTS_A_LINE]).rstrip()
    for line in groups:
        yield "", line
    yield (
        "batch",
        f"{layout.global_batch_size} samples of {length:,} tokens = {layout.micro_batch_size} micro-batch × "
        f"{ranks} ranks × {layout.gradient_accumulation_steps} accumulation steps",
    )
    chosen = " (auto)" if config.training.precision == "auto" else ""
    compiled = ", blocks compiled" if fitted.compiled else ""
    yield "engine", f"ZeRO stage {stage}, {precision}{chosen}, {device}{compiled}"
    samples = steps * layout.global_batch_size
    yield "expect", f"{steps:,} steps, {samples * length:,} tokens, {samples / source.num_samples:.2f} epochs"
    one = checkpoint_bytes(total, model.pool_size * model.pool_dim, stage, precision, ranks)
    count = retained(config.retention, steps, config.checkpoint.interval_steps)
    yield "disk", f"{readable(count * one)}: up to {count} checkpoints of about {readable(one)}"

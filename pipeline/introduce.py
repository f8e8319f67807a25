"""What a run is and what to expect of it, in a few aligned lines before its first step."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.checkpoints.space import checkpoint_bytes, copy_bytes, readable, retained
from pipeline.context import RunContext

LABEL_WIDTH = 8
PARTS_PER_LINE = 4


def introduce(context: RunContext, groups: Sequence[str]) -> list[str]:
    """
    Args:
        groups: a line for each group of parameters of the optimizer.
    """
    return [f"{label:<{LABEL_WIDTH}}{line}" for label, line in _facts(context, groups)]


def describe_start(seconds: Mapping[str, float]) -> str:
    """One line of the seconds that a start has taken, by its parts; the first step follows."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{'start':<{LABEL_WIDTH}}{sum(seconds.values()):.1f} s: {parts}"


def _facts(context: RunContext, groups: Sequence[str]) -> Iterator[tuple[str, str]]:
    config, model, layout, ranks = context.config, context.model, context.layout, context.world.size
    length = config.data.sequence_length
    yield "run", f"{config.run.name} in {config.run_folder}"
    for number, line in enumerate(context.corpus.describe(config.data.train_split)):
        yield "" if number else "data", line
    parts = model.parameter_counts()
    total = sum(parts.values())
    yield "model", f"{config.model.preset}, {total:,} parameters, {model.vocab_size:,} ids"
    shares = [f"{name.replace('_', '-')} {count:,}" for name, count in sorted(parts.items(), key=lambda item: -item[1])]
    for begin in range(0, len(shares), PARTS_PER_LINE):
        yield "", "  ".join(f"{share:<25}" for share in shares[begin : begin + PARTS_PER_LINE]).rstrip()
    for line in groups:
        yield "", line
    yield "batch", f"{layout}, {length:,} tokens each"
    last = 0
    for steps, size in config.training.warmup:
        yield "", f"{size} samples up to step {last + steps:,}"
        last += steps
    chosen = " (auto)" if config.training.precision == "auto" else ""
    compiled = ", blocks compiled" if context.compiled else ""
    device = context.world.device.type
    yield "engine", f"ZeRO stage {context.stage}, {context.precision}{chosen}, {device}{compiled}"
    samples = layout.first_sample(context.steps)
    epochs = samples / context.source.num_samples
    yield "expect", f"{context.steps:,} steps, {samples * length:,} tokens, {epochs:.2f} epochs"
    sizes = (model, config.optimizer.name, context.stage, context.precision, ranks)
    one = checkpoint_bytes(*sizes)
    count = retained(config.retention, context.steps, config.checkpoint.interval_steps)
    yield "disk", f"{readable(count * one)}: up to {count} checkpoints of about {readable(one)}"
    if config.checkpoint.background:
        yield "", f"{readable(copy_bytes(*sizes))} of host memory per rank, at most, for saving in the background"

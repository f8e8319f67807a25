"""The forecast in docs/scaling.md and the cost in the run files are those of today.

`python -m tests.launch.test_scaling` writes them anew.
"""

import json
import re
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launch.preflight.estimate import TOKENS_PER_PARAMETER, Machine, estimate, gibibytes, preset_config
from launch.preflight.measured import MEASURED, expected
from launch.preflight.memory import ModelSize, measure, rank_memory
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.space import checkpoint_bytes
from pipeline.config import load_config
from pipeline.data.loader import BatchLayout
from pipeline.metrics.duration import duration
from pipeline.metrics.utilisation import PEAK_TERAFLOPS
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "scaling.md"
MARKS = re.compile(r"(<!-- forecast -->\n).*?(<!-- end of forecast -->)", re.DOTALL)
CARD = "H100"
GPUS_PER_NODE = 8
SIZES = {1: "zero1", 8: "zero1", 64: "zero2", 256: "zero2", 1024: "zero3_hpz"}
"""GPUs → the file of ds_configs."""
GLOBAL_BATCH = {1: 256, 8: 256, 64: 512, 256: 1024, 1024: 2048}
MICRO_BATCH = 2


def row(gpus: int, model: GlobalLocalConfig, size: ModelSize) -> str:
    zero = json.loads((ROOT / "ds_configs" / f"{SIZES[gpus]}.json").read_text())["zero_optimization"]
    layout = BatchLayout(GLOBAL_BATCH[gpus], MICRO_BATCH, gpus)
    memory = rank_memory(size, zero["stage"], gpus, "bf16", zero)
    checkpoint = checkpoint_bytes(model, "adamw", zero["stage"], "bf16", gpus)
    flops = model.flops_per_token(model.max_position_embeddings)
    rate = gpus * PEAK_TERAFLOPS[CARD] * 1e12 * expected("xl", flops, CARD).mfu / flops
    cells = (
        f"{gpus:,}",
        f"`{SIZES[gpus]}`",
        f"{layout.global_batch_size:,} × {layout.gradient_accumulation_steps}",
        f"{layout.global_batch_size * model.max_position_embeddings / 1e6:.1f} M",
        gibibytes(memory.total),
        f"{rate / 1e6:,.2f} M",
        f"{TOKENS_PER_PARAMETER * size.parameters / rate / 86400:,.2f}",
        gibibytes(checkpoint // max(1, gpus // GPUS_PER_NODE)),
    )
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    model = GlobalLocalConfig.from_preset("xl", activation_checkpointing="full")
    mfu = expected("xl", model.flops_per_token(model.max_position_embeddings), CARD)
    head = (
        f"MFU {mfu.mfu:g} at every number of GPUs: {mfu.source}.\n\n"
        "| GPUs | DeepSpeed JSON | batch: samples × accumulation | tokens per step | GiB per rank | tokens per second "
        "| days | checkpoint, GiB per node |\n|--:|---|--:|--:|--:|--:|--:|--:|\n"
    )
    size = measure(model, MICRO_BATCH, model.max_position_embeddings, "bf16", "adamw")
    return head + "\n".join(row(gpus, model, size) for gpus in SIZES) + "\n"


def test_the_forecast_on_the_page_is_todays() -> None:
    written = MARKS.search(PAGE.read_text())
    assert written is not None
    assert written[0] == f"{written[1]}{table()}{written[2]}"


COST = re.compile(r"^# Cost: .*\n(?:#   .*\n)*", re.MULTILINE)
RUN_FILES = {"wikitext103-small": (("H200", 1), ("A100", 8)), "wikitext103-base": (("H200", 8), ("A100", 8))}
"""Run file → (card, how many) of which it tells the time."""


def cost(run: str) -> str:
    """The lines of a run file that say what it costs."""
    config, lines = load_config(run_file(run)), []
    for card, count in RUN_FILES[run]:
        result = estimate(config, Machine(count, card))
        assert result.seconds
        time, mfu = duration(result.seconds), f"{result.utilisation:g} ({result.utilisation_source})"
        lines.append(f"#   {count} × {card}: {time} at MFU {mfu}\n")
    return f"# Cost: {result.flops_per_token * result.tokens:.1e} operations, evaluation not counted\n" + "".join(lines)


def run_file(run: str) -> Path:
    return ROOT / "launch" / "runs" / f"{run}.yaml"


@pytest.mark.parametrize("run", RUN_FILES)
def test_the_cost_in_a_run_file_is_todays(run: str) -> None:
    written = COST.search(run_file(run).read_text())
    assert written is not None
    assert written[0] == cost(run)


def test_what_was_measured_is_reckoned_with_and_the_rest_is_called_a_guess() -> None:
    (one, *_) = MEASURED
    same = expected(one.preset, one.flops_per_token, one.card)
    assert same.measured
    assert same.mfu == one.mfu
    for preset, flops, card in (
        (one.preset, one.flops_per_token, "L4"),
        (one.preset, 2 * one.flops_per_token, one.card),  # its sizes were changed
        ("no such preset", one.flops_per_token, one.card),
    ):
        other = expected(preset, flops, card)
        assert not other.measured
        assert other.source.startswith("a guess: as `")


def test_the_estimate_of_a_measured_preset_gives_back_what_was_measured() -> None:
    for one in MEASURED:
        result = estimate(preset_config(one.preset), Machine(card=one.card))
        assert result.utilisation_measured, "the preset has changed: measure it again, or take its line out"
        assert result.tokens_per_second == pytest.approx(one.tokens_per_second, rel=0.05)
        given = estimate(preset_config(one.preset), Machine(card=one.card, utilisation=0.5))
        assert not given.utilisation_measured
        assert given.utilisation_source == "as given by --utilisation"


def test_an_unknown_card_is_one_line_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        estimate(preset_config("quickstart"), Machine(card="H300"))
    (problem,) = caught.value.problems
    assert "--card H300: no peak rate in bf16 is known; give --teraflops, or one of A10, A100" in problem


if __name__ == "__main__":
    made = table()
    PAGE.write_text(MARKS.sub(lambda match: match[1] + made + match[2], PAGE.read_text()))
    for name in RUN_FILES:
        lines = cost(name)
        run_file(name).write_text(COST.sub(lambda _, lines=lines: lines, run_file(name).read_text()))

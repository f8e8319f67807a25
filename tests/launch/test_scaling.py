"""The forecast in docs/scaling.md is that of today; `python -m tests.launch.test_scaling` writes it anew."""

import json
import re

from launch.preflight.estimate import TOKENS_PER_PARAMETER, gibibytes
from launch.preflight.memory import ModelSize, measure, rank_memory
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.space import checkpoint_bytes
from pipeline.data.loader import BatchLayout
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "scaling.md"
MARKS = re.compile(r"(<!-- forecast -->\n).*?(<!-- end of forecast -->)", re.DOTALL)
H100_FLOPS = 989e12
MFU = 0.4
GPUS_PER_NODE = 8
SIZES = {1: "zero1", 8: "zero1", 64: "zero2", 256: "zero2", 1024: "zero3_hpz"}
"""GPUs → the file of ds_configs."""
GLOBAL_BATCH = {1: 256, 8: 256, 64: 512, 256: 1024, 1024: 2048}
MICRO_BATCH = 2


def row(gpus: int, model: GlobalLocalConfig, size: ModelSize) -> str:
    zero = json.loads((ROOT / "ds_configs" / f"{SIZES[gpus]}.json").read_text())["zero_optimization"]
    layout = BatchLayout(GLOBAL_BATCH[gpus], MICRO_BATCH, gpus)
    memory = rank_memory(size, zero["stage"], gpus, "bf16", zero)
    checkpoint = checkpoint_bytes(size.parameters, size.frozen, zero["stage"], "bf16", gpus)
    rate = gpus * H100_FLOPS * MFU / model.flops_per_token(model.max_position_embeddings)
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
    head = (
        "| GPUs | DeepSpeed JSON | batch: samples × accumulation | tokens a step | GiB a rank | tokens a second | days "
        "| checkpoint, GiB a node |\n|--:|---|--:|--:|--:|--:|--:|--:|\n"
    )
    model = GlobalLocalConfig.from_preset("xl", activation_checkpointing="full")
    size = measure(model, MICRO_BATCH, model.max_position_embeddings, "bf16")
    return head + "\n".join(row(gpus, model, size) for gpus in SIZES) + "\n"


def test_the_forecast_on_the_page_is_todays() -> None:
    written = MARKS.search(PAGE.read_text())
    assert written is not None
    assert written[0] == f"{written[1]}{table()}{written[2]}"


if __name__ == "__main__":
    made = table()
    PAGE.write_text(MARKS.sub(lambda match: match[1] + made + match[2], PAGE.read_text()))

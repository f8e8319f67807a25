"""The table of presets in docs/model.md: `python -m tests.model.preset_table` writes it anew."""

import re

from model.configuration_globallocal import GlobalLocalConfig
from model.presets_globallocal import PRESETS
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "model.md"
HEAD = "| preset | parameters | in the vocabulary | frozen pool | FLOPs per token | width × layers | receptive field |"
TABLE = re.compile(rf"^{re.escape(HEAD)}\n(?:\|.*\n)+", re.M)


def preset_table() -> str:
    rows = [HEAD, "|---|---|---|---|---|---|---|"]
    for name in PRESETS:
        config = GlobalLocalConfig.from_preset(name)
        counts = config.parameter_counts()
        pool = f"{config.pool_size:,} × {config.pool_dim:,}"
        vocabulary = counts["embedding"] + counts["head"]
        cells = [
            f"`{name}`",
            f"{sum(counts.values()) / 1e6:,.1f} M",
            f"{vocabulary / 1e6:,.1f} M",
            pool,
            f"{config.flops_per_token(config.max_position_embeddings) / 1e6:,.0f} M",
            f"{config.hidden_size:,} × {config.num_hidden_layers}",
            f"{config.receptive_field:,} tokens",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(preset_table(), PAGE.read_text()))

"""Named sizes: settings that belong together.

A preset never changes: checkpoints name theirs, and are built from it again. A run whose preset changed all the same is
refused at its resume, by what is in its `model/`.
"""

from typing import Any

# Each layer looks further than the one below it: 1,173 positions after four layers, and on from there.
_WIDENING = [[1, 2], [4, 8], [16, 64], [128, 512]]

PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes on two CPU cores: cheap routers, small vocabulary.
    "quickstart": {
        "vocab_size": 4096, "hidden_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 256,
        "pool_size": 1024, "pool_dim": 48, "router_hidden_size": 48, "conv_dilations": [[1, 2], [4, 8]],
        "router_context": "summary", "summary_heads": 4,
    },
    # The published model's sizes and layout, made causal.
    "seed": {
        "vocab_size": 50257, "hidden_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 512,
        "pool_size": 10000, "pool_dim": 2048, "conv_dilations": [1, 2, 4], "dropout": 0.1,
        "norm_placement": "post", "tie_word_embeddings": False,
    },
    # About 45 M, 130 M, 350 M and 1.3 B parameters; a block has as many as two of a GPT's of the same width.
    "small": {
        "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 1024,
        "pool_size": 4096, "pool_dim": 256, "router_hidden_size": 128, "conv_dilations": _WIDENING,
        "router_context": "summary",
    },
    "base": {
        "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 7, "max_position_embeddings": 1024,
        "pool_size": 4096, "pool_dim": 384, "router_hidden_size": 192, "conv_dilations": _WIDENING,
        "router_context": "summary",
    },
    "large": {
        "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 12, "max_position_embeddings": 2048,
        "pool_size": 4096, "pool_dim": 512, "router_hidden_size": 256, "conv_dilations": _WIDENING,
        "router_context": "summary",
    },
    "xl": {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 12, "max_position_embeddings": 2048,
        "pool_size": 8192, "pool_dim": 1024, "router_hidden_size": 512, "conv_dilations": _WIDENING,
        "router_context": "summary",
    },
}  # fmt: skip

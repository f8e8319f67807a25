"""Small models for the tests of this folder."""

from typing import Any

import torch

from model import reference
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "pool_size": 17,
    "pool_dim": 10,
    "router_hidden_size": 9,
    "conv_dilations": [[1, 2], [4]],
}


def tiny_config(**overrides) -> GlobalLocalConfig:
    return GlobalLocalConfig(**(TINY | overrides))


def scaled_preset(name: str, **overrides) -> GlobalLocalConfig:
    """The preset's layout (norms, dilations, tying, top-k) at a tiny size."""
    small = {k: v for k, v in TINY.items() if k != "conv_dilations"} | {"num_hidden_layers": 4, "dropout": 0.0}
    return GlobalLocalConfig.from_preset(name, **(small | overrides))


def make_model(config: GlobalLocalConfig, seed: int = 0, noise: float = 0.2, dtype=torch.float64):
    """A model whose every parameter, biases and norms included, differs from its neutral value."""
    torch.manual_seed(seed)
    model = GlobalLocalForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


def random_ids(config: GlobalLocalConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)


def reference_weights(model: GlobalLocalForCausalLM) -> reference.Weights:
    """The model's tensors as leaves of their own, so that the reference has gradients of its own."""
    return {
        name: tensor.detach().clone().requires_grad_(name != "model.pool")
        for name, tensor in model.state_dict().items()
    }


APART: dict[str, Any] = {"document_boundaries": "reset", "eos_token_id": [3, 7]}  # about 15 tokens a document

LAYOUTS: dict[str, dict[str, Any]] = {
    "token": {"router_context": "token"},
    "summary": {"router_context": "summary"},
    "delta": {"router_context": "summary", "summary_rule": "delta", "summary_key_size": 6},
    "delta with keys per head": {
        "router_context": "summary",
        "summary_rule": "delta",
        "summary_key_size": 5,
        "summary_key_heads": 2,
        "block_router": False,
        "branch_gain": 2.5,
    },
    "summary, documents apart": {"router_context": "summary", **APART},
    "delta, documents apart": {"router_context": "summary", "summary_rule": "delta", "summary_key_size": 6, **APART},
    "balanced router": {"router_balance": 6.0},
    "post-norm": {"router_context": "summary", "norm_placement": "post", "branch_gain": 2.5},
    "product keys": {"router_scores": "product_key", "pool_size": 20, "router_hidden_size": 10, "router_top_k": 5},
    "wide pool": {"pool_dim": 16},
    "one tap": {"conv_kernel_size": 1},
}


def repeated(run, device):
    """What `captured` gives, without a graph: the same step again, its result in the same tensor."""
    result = run()
    return lambda: result.copy_(run()), result

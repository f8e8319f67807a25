"""The two models that are compared, behind one face: `loss(ids, targets)`, `flops_per_token`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from model.ops_loss_globallocal import vocabulary_loss
from tests.benchmarks.quality.text import VOCAB_SIZE


@dataclass(frozen=True)
class Contender:
    """What is trained: `kind` is "globallocal" or "gpt".

    `variant` is for ablations that no user needs: of the pool, "trained" or "zero" (nothing to mix); "bfloat16" for
    the passes on a CPU; of the GPT, "fan_in" (matrices begin with deviation 1/√fan_in, as GlobalLocal's do, and not
    with 0.02) and "embedding" (the tied embedding begins with deviation 0.5/√h, as GlobalLocal's does).
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    def build(self, sequence_length: int) -> "GlobalLocal | GPT":
        """The model with fresh weights from torch's random state."""
        shared = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": sequence_length}
        if self.kind == "gpt":
            return GPT(LlamaConfig(**(shared | GPT_DEFAULTS | self.settings)), self.variant)
        return GlobalLocal(GlobalLocalConfig(**(shared | self.settings)), self.variant)


class GlobalLocal(nn.Module):
    """GlobalLocal as it is trained by the pipeline."""

    def __init__(self, config: GlobalLocalConfig, variant: str) -> None:
        super().__init__()
        self.model = GlobalLocalForCausalLM(config)
        base = self.model.model
        if variant == "zero":
            base.pool.zero_()
        if variant == "trained":
            rows = base.pool
            del base.pool
            base.pool = nn.Parameter(rows)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, S] each → the loss to descend, and the language loss alone."""
        output = self.model(ids, shift_labels=targets)
        return output.loss, output.language_loss

    def flops_per_token(self, sequence_length: int) -> float:
        return self.model.config.flops_per_token(sequence_length)


GPT_DEFAULTS: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "tie_word_embeddings": True,
    "use_cache": False,
    "attention_bias": False,
    "mlp_bias": False,
}


class GPT(nn.Module):
    """A Llama of `transformers`: RMS norm in front, rotary positions, SwiGLU, SDPA, tied embeddings.

    Its loss is computed by GlobalLocal's chunked kernel, so that neither model has the cheaper head.
    """

    def __init__(self, config: LlamaConfig, variant: str) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)
        self.no_bias: Tensor
        self.register_buffer("no_bias", torch.zeros(config.vocab_size), persistent=False)
        depth = (2 * config.num_hidden_layers) ** -0.5
        with torch.no_grad():  # residual scaling by depth, as GPT-2 has it and as GlobalLocal has it
            for name, weight in self.model.named_parameters():
                if variant == "fan_in" and "proj" in name:
                    weight.normal_(std=weight.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(depth)
            if variant == "embedding":
                torch.nn.init.normal_(self.model.model.embed_tokens.weight, std=0.5 * config.hidden_size**-0.5)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, S] each → the loss, twice."""
        hidden = self.model.model(input_ids=ids).last_hidden_state
        loss, _ = vocabulary_loss(hidden.flatten(0, 1), self.model.lm_head.weight, self.no_bias, targets.flatten())
        return loss, loss

    def flops_per_token(self, sequence_length: int) -> float:
        """6 · matrix parameters, and the causal half of the scores: 6 · L · S · h."""
        config = self.model.config
        h, layers = config.hidden_size, config.num_hidden_layers
        heads = (config.num_key_value_heads or config.num_attention_heads) / config.num_attention_heads
        block = (2 + 2 * heads) * h * h + 3 * h * config.intermediate_size
        return 6.0 * (layers * (block + sequence_length * h) + config.vocab_size * h)

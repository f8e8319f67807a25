"""What the models return.

Shapes and symbols as in `configuration_globallocal.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput

from .decoding_globallocal import GlobalLocalCache


class Routing(NamedTuple):
    """What each token read: where its blocks looked, and which pool rows its routers chose.

    Per block there are n routers, the attention's and the block's own, if it has one; padding has values too.
    """

    gates: Tensor  # at least float32 [B, S, L], 1 is local, 0 global
    rows: Tensor  # int64 [B, S, L, n, k], the largest share first
    shares: Tensor  # at least float32 [B, S, L, n, k], of the mixture; their sum is 1


@dataclass
class GlobalLocalModelOutput(ModelOutput):
    """What `GlobalLocalModel` returns.

    Attributes:
        last_hidden_state: [B, S, h], behind the final norm.
        diversity_loss: float32 scalar, summed over all routers and scaled.
        router_statistics: see `GlobalLocalCausalLMOutput`.
        cache: state for the next tokens, if asked for.
        hidden_states: the embedding and every block's output, if asked for.
    """

    last_hidden_state: Tensor | None = None
    diversity_loss: Tensor | None = None
    router_statistics: dict[str, Tensor] | None = None
    cache: GlobalLocalCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GlobalLocalCausalLMOutput(ModelOutput):
    """What `GlobalLocalForCausalLM` returns.

    Attributes:
        loss: language_loss + diversity_loss, and the z-loss where the config has one; only with labels.
        logits: [B, S, V]; None on the training path (`shift_labels`).
        language_loss: mean cross entropy in nats over the valid targets, float32.
        diversity_loss: float32 scalar, summed over all routers and scaled.
        router_statistics: float32 tensors without gradient: `gate_mean` [L] (1 is local, 0 global), and per
            layer and router (the attention's, the block's own): `pool_usage` [L, n, N], the mixture weight that
            each row got in this batch, `pool_entropy_nats` of it and `pool_hit_rate`, the fraction of rows in
            use, [L, n] each.
        cache: state for the next tokens, if asked for.
        hidden_states: the embedding and every block's output, if asked for.
        routing: what each token read, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    language_loss: Tensor | None = None
    diversity_loss: Tensor | None = None
    router_statistics: dict[str, Tensor] | None = None
    cache: GlobalLocalCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing: Routing | None = None

    @property
    def past_key_values(self) -> GlobalLocalCache | None:
        """The cache under its older name."""
        return self.cache

"""The parts of a GlobalLocal block. Shapes and symbols as in `configuration_globallocal.py`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_globallocal import GlobalLocalConfig
from .ops_globallocal import RowChoice, causal_convolutions, dot_rows, mix_rows, sum_by_row, top_rows


class FoldedRouter(NamedTuple):
    """A router's matrices multiplied out: what is left depends on the weights alone, not on the tokens."""

    input_weight: Tensor  # [2h, h]: the product for the projected input, above the one for its variance
    input_bias: Tensor  # [2h]
    variance_bias: Tensor  # scalar
    mixture_weight: Tensor  # [h, D]
    output_bias: Tensor  # [h]


class GlobalLocalCache:
    """Decoding state of constant size: per layer the last inputs of the convolutions, and the folds.

    Attributes:
        history: per layer [B, (K − 1) · max dilation, h], zeros in front of the first token.
        folds: per router, filled at the first call; valid as long as the weights do not change.
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.history: list[Tensor | None] = [None] * num_layers
        self.folds: dict[nn.Module, FoldedRouter] = {}
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what was row beam_idx[i]."""
        self.history = [h if h is None else h.index_select(0, beam_idx.to(h.device)) for h in self.history]


class CausalConvolution(nn.Module):
    """The local branch: parallel dilated causal convolutions, GELU, concatenated, projected."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        h, self.kernel_size = config.hidden_size, config.conv_kernel_size
        self.layer, self.dilations = layer, config.dilations_of_layer(layer)
        self.reach = (self.kernel_size - 1) * max(self.dilations)
        num_branches = len(self.dilations)
        self.branch_weight = nn.Parameter(torch.empty(num_branches, h, self.kernel_size * h))
        self.branch_bias = nn.Parameter(torch.empty(num_branches * h))
        self.projection = nn.Linear(num_branches * h, h)

    def forward(self, x: Tensor, mask: Tensor | None, cache: GlobalLocalCache | None) -> Tensor:
        """x [B, S, h], mask [B, S, 1] or None → [B, S, h]."""
        if mask is not None:
            x = x * mask
        history = cache.history[self.layer] if cache is not None else None
        padded = F.pad(x, (0, 0, self.reach, 0)) if history is None else torch.cat([history, x], dim=1)
        if cache is not None:
            cache.history[self.layer] = padded[:, padded.shape[1] - self.reach :].clone()
        bias = self.branch_bias.view(len(self.dilations), -1)
        branches = causal_convolutions(padded, self.branch_weight, bias, x.shape[1], self.dilations)
        return self.projection(F.gelu(branches))


class TensorRouter(nn.Module):
    """Mixes the k best pool rows of each token with its projected input, and maps both back to width h.

    Every matrix is a direct parameter of this module, because `fold` multiplies them with each other: under
    ZeRO-3 only a module's own parameters are whole while it runs.
    """

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__()
        h, dim, score = config.hidden_size, config.pool_dim, config.router_hidden_size
        self.top_k, self.eps = config.router_top_k, config.layer_norm_eps
        self.diversity_loss_scale = config.diversity_loss_scale
        self.score_hidden_weight = nn.Parameter(torch.empty(score, h))
        self.score_hidden_bias = nn.Parameter(torch.empty(score))
        self.score_weight = nn.Parameter(torch.empty(config.pool_size, score))
        self.score_bias = nn.Parameter(torch.empty(config.pool_size))
        self.temperature = nn.Parameter(torch.empty(1))  # not 0-d: DeepSpeed broadcasts parameters as bytes
        self.input_weight = nn.Parameter(torch.empty(dim, h))
        self.input_bias = nn.Parameter(torch.empty(dim))
        self.input_norm_weight = nn.Parameter(torch.empty(dim))
        self.input_norm_bias = nn.Parameter(torch.empty(dim))
        self.mapping_weight = nn.Parameter(torch.empty(dim, 2 * dim))
        self.mapping_bias = nn.Parameter(torch.empty(dim))
        self.output_weight = nn.Parameter(torch.empty(h, dim))
        self.output_bias = nn.Parameter(torch.empty(h))

    def fold(self) -> FoldedRouter:
        """Multiplies the weights out.

        output(mapping([LayerNorm(input(x)), mixture])) is linear in the mixture and, but for the division by
        the norm's deviation, in x. That variance is a quadratic form: with A the input weights and a their
        bias, both centred over D, it is |A x + a|² / D = xᵀ(AᵀA/D)x + 2 xᵀ(Aᵀa/D) + aᵀa/D.
        """
        dim = self.input_weight.shape[0]
        from_input, from_mixture = (self.output_weight @ self.mapping_weight).split(dim, dim=1)
        centred = self.input_weight - self.input_weight.mean(dim=0)
        centred_bias = self.input_bias - self.input_bias.mean()
        scaled = from_input * self.input_norm_weight
        covariance = centred.T / dim
        return FoldedRouter(
            input_weight=torch.cat([scaled @ centred, covariance @ centred]),
            input_bias=torch.cat([scaled @ centred_bias, 2 * (covariance @ centred_bias)]),
            variance_bias=centred_bias.square().mean(),
            mixture_weight=from_mixture,
            output_bias=from_input @ self.input_norm_bias
            + torch.addmv(self.output_bias, self.output_weight, self.mapping_bias),
        )

    def forward(
        self, x: Tensor, pool: Tensor, mask: Tensor | None, cache: GlobalLocalCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h], pool [N, D], mask [B, S, 1] or None → [B, S, h], diversity loss, statistics [2]."""
        tokens = x.reshape(-1, x.shape[-1])
        folded = self._folded(cache)
        choice, weights = self._choose(tokens)
        inverse_deviation, projected = self._normalised_input(tokens, folded)
        output = torch.addcmul(folded.output_bias, projected, inverse_deviation) + self._mixture(
            weights.to(pool.dtype), pool, folded.mixture_weight, choice
        )
        if mask is not None:
            weights = weights * mask.reshape(-1, 1)
        usage = sum_by_row(weights, choice)
        token_count = tokens.shape[0] if mask is None else mask.sum()
        return (
            output.view_as(x),
            self._diversity_loss(usage, token_count, x.shape[-1]),
            _pool_statistics(usage),
        )

    def _folded(self, cache: GlobalLocalCache | None) -> FoldedRouter:
        if cache is None:
            return self.fold()
        if self not in cache.folds:
            cache.folds[self] = self.fold()
        return cache.folds[self]

    def _choose(self, tokens: Tensor) -> tuple[RowChoice, Tensor]:
        """The k best rows of each token and their softmax weights [T, k], at least float32.

        Chosen by the plain scores: the temperature is positive and the clamp monotonic, so neither changes
        the order. Only the chosen scores have a gradient, so only they are computed with one.
        """
        hidden = F.relu(F.linear(tokens, self.score_hidden_weight, self.score_hidden_bias))
        indices = top_rows(hidden, self.score_weight, self.score_bias, self.top_k)
        choice = RowChoice(indices, self.score_weight.shape[0])
        scores = _at_least_float32(dot_rows(hidden, self.score_weight, self.score_bias, choice))
        temperature = _at_least_float32(self.temperature).clamp(0.1, 5.0)
        return choice, (scores / temperature).clamp(-10.0, 10.0).softmax(dim=-1)

    def _normalised_input(self, tokens: Tensor, folded: FoldedRouter) -> tuple[Tensor, Tensor]:
        """1 / deviation [T, 1] and the folded projection [T, h] of the input norm."""
        projected, quadratic = F.linear(tokens, folded.input_weight, folded.input_bias).chunk(2, dim=-1)
        variance = (_at_least_float32(quadratic) * tokens).sum(dim=-1, keepdim=True) + folded.variance_bias
        return (variance.clamp_min(0.0) + self.eps).rsqrt().to(tokens.dtype), projected

    @staticmethod
    def _mixture(weights: Tensor, pool: Tensor, mixture_weight: Tensor, choice: RowChoice) -> Tensor:
        """The mixture at width h; whichever is fewer operations: project the pool, or the mixtures.

        Projecting the pool takes 2 products of N rows (forward, weight gradient), projecting the mixtures
        takes 3 of T rows (their gradient is needed too).
        """
        num_products = (2, 3) if torch.is_grad_enabled() else (1, 1)
        if num_products[0] * pool.shape[0] <= num_products[1] * weights.shape[0]:
            return mix_rows(weights, F.linear(pool, mixture_weight), choice)
        return F.linear(mix_rows(weights, pool, choice), mixture_weight)

    def _diversity_loss(self, usage: Tensor, token_count: int | Tensor, hidden_size: int) -> Tensor:
        """Mean squared distance of the pool's usage from uniform, scaled as in the seed."""
        fraction = usage / (usage.sum() + 1e-8)
        distance = (fraction - 1.0 / usage.numel()).square().mean()
        coverage = token_count * (hidden_size / (usage.numel() * self.top_k))
        coverage = coverage.clamp(max=1.0) if isinstance(coverage, Tensor) else min(1.0, coverage)
        return distance * coverage * self.diversity_loss_scale


@torch.no_grad()
def _pool_statistics(usage: Tensor) -> Tensor:
    """Entropy of the usage in nats, and the fraction of rows in use: [2]."""
    fraction = usage / usage.sum()
    return torch.stack([torch.special.entr(fraction).sum(), (usage > 0).to(usage.dtype).mean()])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GlobalLocalAttention(nn.Module):
    """Per token, a gate between the local branch (convolutions) and the global one (router)."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        self.local = CausalConvolution(config, layer)
        self.router = TensorRouter(config)
        self.gate = nn.Linear(config.hidden_size, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, pool: Tensor, mask: Tensor | None, cache: GlobalLocalCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, S, h] → output [B, S, h], diversity loss, router statistics [2], mean gate."""
        local = self.dropout(self.local(x, mask, cache))
        routed, diversity, statistics = self.router(x, pool, mask, cache)
        gate = torch.sigmoid(self.gate(x))
        mean_gate = _at_least_float32(gate.detach()).mean()
        return self.dropout(torch.lerp(routed, local, gate)), diversity, statistics, mean_gate


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear, dropout."""

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.hidden_size, config.intermediate_size)
        self.projection = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] → [B, S, h]."""
        return self.dropout(self.projection(self.dropout(F.gelu(self.expansion(x)))))


class GlobalLocalBlock(nn.Module):
    """Attention replacement, router, feed-forward: three residual sublayers with a norm each."""

    def __init__(self, config: GlobalLocalConfig, layer: int) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.attention = GlobalLocalAttention(config, layer)
        self.router = TensorRouter(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm, self.router_norm, self.feed_forward_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(3)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, pool: Tensor, mask: Tensor | None = None, cache: GlobalLocalCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h], pool [N, D], mask [B, S, 1] → x, diversity loss, statistics [5]: gate, then two routers."""
        before = self.attention_norm(x) if self.norm_first else x
        update, diversity, attention_statistics, gate = self.attention(before, pool, mask, cache)
        x = x + self.dropout(update)
        x = x if self.norm_first else self.attention_norm(x)

        before = self.router_norm(x) if self.norm_first else x
        update, router_diversity, router_statistics = self.router(before, pool, mask, cache)
        x = x + self.dropout(update)
        x = x if self.norm_first else self.router_norm(x)

        if self.norm_first:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = self.feed_forward_norm(x + self.feed_forward(x))
        statistics = torch.cat([gate.reshape(1), attention_statistics, router_statistics])
        return x, diversity + router_diversity, statistics

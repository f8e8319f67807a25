"""Routers: which rows of the frozen pool a token mixes, and what becomes of the mixture.

Shapes and symbols as in `configuration_globallocal.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_globallocal import GlobalLocalConfig
from .library_globallocal import exporting
from .ops_router_globallocal import RowChoice, balanced, dot_rows, mix_rows, sum_by_row, top_rows


class FoldedInput(NamedTuple):
    """The input projection multiplied into what follows its norm, which is left to divide by the deviation."""

    weight: Tensor  # [2h, h]: the product for the projected input, above the one for its variance
    bias: Tensor  # [2h]
    variance_bias: Tensor  # scalar


class FoldedRouter(NamedTuple):
    """A router's matrices multiplied out: what is left depends on the weights alone, not on the tokens."""

    input: FoldedInput | None  # only where it is fewer operations, with a pool wider than the model (D > h)
    input_weight: Tensor  # [h, D], of the normalised input
    mixture_weight: Tensor  # [h, D]
    output_bias: Tensor  # [h]


class RouterScores(nn.Module):
    """Which k pool rows each token chooses, and their scores: the part shared by both kinds.

    The choice is made by plain scores: the router's temperature is positive and its clamp monotonic, so
    neither changes the order. Only the chosen scores have a gradient, so only they are computed with one.
    """

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__()
        self.top_k, self.balance_speed, self.eps = config.router_top_k, config.router_balance, config.layer_norm_eps
        self.hidden_weight = nn.Parameter(torch.empty(config.router_hidden_size, config.hidden_size))
        self.hidden_bias = nn.Parameter(torch.empty(config.router_hidden_size))

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [T, h] → [T, R]."""
        hidden = F.linear(tokens, self.hidden_weight, self.hidden_bias)
        return F.layer_norm(hidden, hidden.shape[-1:], eps=self.eps) if self.balance_speed else F.relu(hidden)


class DenseScores(RouterScores):
    """One key a pool row, as in the seed: every token is compared with all N."""

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__(config)
        self.keys_weight = nn.Parameter(torch.empty(config.pool_size, config.router_hidden_size))
        self.keys_bias = nn.Parameter(torch.empty(config.pool_size))
        self.balance = nn.Parameter(torch.empty(config.pool_size)) if config.router_balance else None

    def choice_bias(self) -> Tensor:
        """What a row's score has on top in the choice: [N]."""
        return self.keys_bias if self.balance is None else self.keys_bias + self.balance_speed * self.balance

    def forward(self, tokens: Tensor, grouped: bool) -> tuple[RowChoice, Tensor]:
        """tokens [T, h] → the choice among N rows, and its scores [T, k]."""
        hidden = self.hidden(tokens)
        _, indices = top_rows(hidden, self.keys_weight, self.choice_bias(), self.top_k)
        choice = RowChoice(indices, self.keys_weight.shape[0], grouped)
        scores = dot_rows(hidden, self.keys_weight, self.keys_bias, choice)
        return choice, scores if self.balance is None or not grouped else balanced(scores, self.balance, choice)


class ProductKeyScores(RouterScores):
    """N = a · b rows addressed by a + b keys: row (i, j) scores left · left_key[i] + right · right_key[j].

    The k best pairs are among the k best keys of either side, so the work grows with √N.
    Lample et al. 2019, https://arxiv.org/abs/1907.05242.
    """

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__(config)
        half = config.router_hidden_size // 2
        left_keys, right_keys = config.product_key_shape
        self.left_weight = nn.Parameter(torch.empty(left_keys, half))
        self.left_bias = nn.Parameter(torch.empty(left_keys))
        self.right_weight = nn.Parameter(torch.empty(right_keys, half))
        self.right_bias = nn.Parameter(torch.empty(right_keys))

    def forward(self, tokens: Tensor, grouped: bool) -> tuple[RowChoice, Tensor]:
        """tokens [T, h] → the choice among N rows, and its scores [T, k]."""
        left, right = (part.contiguous() for part in self.hidden(tokens).chunk(2, dim=-1))
        left_index, right_index = self._best_pairs(left, right)
        left_choice = RowChoice(left_index, self.left_weight.shape[0], grouped)
        right_choice = RowChoice(right_index, self.right_weight.shape[0], grouped)
        scores = dot_rows(left, self.left_weight, self.left_bias, left_choice)
        scores = scores + dot_rows(right, self.right_weight, self.right_bias, right_choice)
        num_right = self.right_weight.shape[0]
        num_rows = self.left_weight.shape[0] * num_right
        return RowChoice(left_index * num_right + right_index, num_rows, grouped), scores

    @torch.no_grad()
    def _best_pairs(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Key indices of the k best pairs, left and right: int64 [T, k] each."""
        best_left, left_index = top_rows(left, self.left_weight, self.left_bias, self.top_k)
        best_right, right_index = top_rows(right, self.right_weight, self.right_bias, self.top_k)
        pairs = (best_left.unsqueeze(2) + best_right.unsqueeze(1)).flatten(1)
        best = pairs.topk(self.top_k, dim=-1).indices
        num_right = right_index.shape[1]
        return left_index.gather(1, best // num_right), right_index.gather(1, best % num_right)


SCORES = {"dense": DenseScores, "product_key": ProductKeyScores}


class TensorRouter(nn.Module):
    """Mixes the k best pool rows of each token with its projected input, and maps both back to width h.

    The matrices behind the choice are direct parameters of this module, because `fold` multiplies them with
    each other: under ZeRO-3 only a module's own parameters are whole while it runs.
    """

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__()
        h, dim = config.hidden_size, config.pool_dim
        self.eps = config.layer_norm_eps
        self.diversity_loss_scale = config.diversity_loss_scale
        self.scores = SCORES[config.router_scores](config)
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
        """Multiplies the weights out: output(mapping([LayerNorm(input(x)), mixture])) is linear behind the norm."""
        dim, h = self.input_weight.shape
        from_input, from_mixture = (self.output_weight @ self.mapping_weight).split(dim, dim=1)
        input_weight = from_input * self.input_norm_weight
        return FoldedRouter(
            input=self._fold_input(input_weight) if dim > h else None,
            input_weight=input_weight,
            mixture_weight=from_mixture,
            output_bias=from_input @ self.input_norm_bias
            + torch.addmv(self.output_bias, self.output_weight, self.mapping_bias),
        )

    def _fold_input(self, behind_norm: Tensor) -> FoldedInput:
        """But for the division by the norm's deviation, the router is linear in x, and the variance is quadratic.

        With A the input weights and a their bias, both centred over D, it is |A x + a|² / D =
        xᵀ(AᵀA/D)x + 2 xᵀ(Aᵀa/D) + aᵀa/D.
        """
        centred = self.input_weight - self.input_weight.mean(dim=0)
        centred_bias = self.input_bias - self.input_bias.mean()
        covariance = centred.T / centred.shape[0]
        return FoldedInput(
            weight=torch.cat([behind_norm @ centred, covariance @ centred]),
            bias=torch.cat([behind_norm @ centred_bias, 2 * (covariance @ centred_bias)]),
            variance_bias=centred_bias.square().mean(),
        )

    def forward(
        self, x: Tensor, pool: Tensor, mask: Tensor | None, folds: dict[nn.Module, FoldedRouter] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h], pool [N, D], mask [B, S, 1] or None → [B, S, h], diversity loss, usage [N]: weight a row got.

        `folds` holds what was multiplied out while decoding; the weights do not change there. One token more has
        no diversity loss and no usage: nobody reads them, and they would cost as much as the token itself; nor has an
        exported graph.
        """
        counted = not exporting() and (folds is None or x.shape[1] > 1 or torch.is_grad_enabled())
        tokens = x.reshape(-1, x.shape[-1])
        folded = self._folded(folds)
        choice, scores = self.scores(tokens, counted)
        weights = self._weights(scores)
        mixture = self._mixture(weights.to(pool.dtype), pool, folded.mixture_weight, choice)
        output = self._from_input(tokens, folded) + mixture
        if not counted:
            return output.view_as(x), weights.new_zeros(()), weights.new_zeros(pool.shape[0])
        if mask is not None:
            weights = weights * mask.reshape(-1, 1)
        usage = sum_by_row(weights, choice)
        token_count = tokens.shape[0] if mask is None else mask.sum()
        return (
            output.view_as(x),
            self._diversity_loss(usage, token_count, x.shape[-1]),
            usage.detach(),
        )

    def _folded(self, folds: dict[nn.Module, FoldedRouter] | None) -> FoldedRouter:
        if folds is None:
            return self.fold()
        if self not in folds:
            folds[self] = self.fold()
        return folds[self]

    def _weights(self, scores: Tensor) -> Tensor:
        """Softmax over the chosen scores [T, k], at least float32."""
        temperature = at_least_float32(self.temperature).clamp(0.1, 5.0)
        return (at_least_float32(scores) / temperature).clamp(-10.0, 10.0).softmax(dim=-1)

    def _from_input(self, tokens: Tensor, folded: FoldedRouter) -> Tensor:
        """What the tokens [T, h] themselves give to the output, its bias included: [T, h]."""
        if folded.input is None:
            projected = F.linear(tokens, self.input_weight, self.input_bias)
            normalised = F.layer_norm(projected, projected.shape[-1:], eps=self.eps)
            return F.linear(normalised, folded.input_weight, folded.output_bias)
        projected, quadratic = F.linear(tokens, folded.input.weight, folded.input.bias).chunk(2, dim=-1)
        variance = (at_least_float32(quadratic) * tokens).sum(dim=-1, keepdim=True) + folded.input.variance_bias
        inverse_deviation = (variance.clamp_min(0.0) + self.eps).rsqrt().to(tokens.dtype)
        return torch.addcmul(folded.output_bias, projected, inverse_deviation)

    @staticmethod
    def _mixture(weights: Tensor, pool: Tensor, mixture_weight: Tensor, choice: RowChoice) -> Tensor:
        """The mixture at width h; whichever is fewer operations: project the pool, or the mixtures.

        Projecting the pool takes 2 products of N rows (forward, weight gradient), projecting the mixtures
        takes 3 of T rows (their gradient is needed too).
        """
        num_products = (2, 3) if torch.is_grad_enabled() else (1, 1)
        if not exporting() and num_products[0] * pool.shape[0] <= num_products[1] * weights.shape[0]:
            return mix_rows(weights, F.linear(pool, mixture_weight), choice)
        return F.linear(mix_rows(weights, pool, choice), mixture_weight)

    def _diversity_loss(self, usage: Tensor, token_count: int | Tensor, hidden_size: int) -> Tensor:
        """Mean squared distance of the pool's usage from uniform, scaled as in the seed."""
        fraction = usage / (usage.sum() + 1e-8)
        distance = (fraction - 1.0 / usage.numel()).square().mean()
        coverage = token_count * (hidden_size / (usage.numel() * self.scores.top_k))
        coverage = coverage.clamp(max=1.0) if isinstance(coverage, Tensor) else min(1.0, coverage)
        return distance * coverage * self.diversity_loss_scale


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions become float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

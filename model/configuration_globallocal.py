"""The configuration of a GlobalLocal model: sizes, presets, parameter and FLOP counts.

Symbols used in the folder: B batch, S sequence, T = B·S tokens, h hidden_size, V vocab_size, N pool_size,
D pool_dim, R router_hidden_size, k router_top_k, K conv_kernel_size, L num_hidden_layers.
"""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .presets_globallocal import PRESETS
from .values_globallocal import short, value_wanted

PIECE_ENTRIES = 64  # of the tokens that chose one pool row: what one program of a kernel sums
SUMMARY_CHUNK = 64  # positions that attend to each other, before a state stands for them
SUMMARY_TAPS = 4  # of the short convolution of a delta summary: this position and three before it
UNIT_EPS = 1e-6  # under the root, where keys and queries are brought to length 1


@strict
class GlobalLocalConfig(PreTrainedConfig):
    """Settings of a GlobalLocal model; every one is written to `config.json`.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        intermediate_size: width of the feed-forward; 0 stands for 4 · hidden_size.
        max_position_embeddings: the longest sequence in tokens that training uses; no hard limit.
        pool_size: rows of the frozen tensor pool that all layers share.
        pool_dim: width of a pool row; 0 stands for 4 · hidden_size.
        pool_seed: the pool is a pure function of (pool_seed, pool_size, pool_dim).
        conv_kernel_size: taps of each causal convolution.
        conv_dilations: dilations of the parallel convolutions of a layer. One list serves all layers; a list
            of lists is cycled over the layers, for example [[1, 2, 4], [8, 16, 32]].
        router_top_k: pool rows that a token mixes.
        router_temperature: initial value of the learned temperature, held in 0.1 … 5.
        router_hidden_size: width of the score network's hidden layer; 0 stands for min(1024, pool_size).
        router_scores: "dense" (one key a pool row) or "product_key" (√pool_size keys a side, for pools of millions).
        router_balance: learning rates by which a step moves a row's balance, which the choice alone adds to its score,
            so that all rows are chosen (after arXiv:2408.15664); scores are then of a normalised layer. 0 for none.
        router_context: what the global branch reads: "token" (the seed) or "summary" (the token and what it asks a
            running summary of everything before it, so that it sees the whole prefix at linear cost).
        summary_heads: parts of the summary that forget at rates of their own; 0 stands for gcd(8, hidden_size).
        summary_key_size: width of the summary's keys and queries: its state is summary_key_size · hidden_size
            numbers per layer.
        summary_rule: "average" (each head's state moves towards what is new, whatever it holds) or "delta" (it keeps
            its own share and corrects what it holds under the new key; keys, queries and values are mixed by a short
            convolution first). Only the latter recalls what followed a word that it has seen once.
        summary_key_heads: sets of keys and queries, one for neighbouring heads each; above 1 with "delta" alone.
        block_router: a router of its own in front of the feed-forward, beside the attention's, as the seed has it.
        branch_gain: factor of both branches in the residual sum. The seed's is 1: its gate, near a half, halves them; 2
            makes up for that.
        dropout: probability, applied where the seed applies it.
        diversity_loss_scale: factor of each router's loss; the sum over routers is scaled by a further 0.01.
        norm_placement: "pre" (norm in front of each sublayer) or "post" (norm after the residual sum).
        document_boundaries: "carry" (an end-of-text token is one like others) or "reset" (whatever stands behind an
            eos_token_id sees nothing from before it, as if its document stood alone).
        tie_word_embeddings: one matrix for the embedding and the head.
        head_bias: a number per token id in the head. Without it the embedding's rows carry how frequent a word is.
        logit_soft_cap: logits z become cap · tanh(z / cap), and so stay within the cap (arXiv:2408.00118); 0 for none.
        z_loss: factor of the mean of log² Σ exp(logits), no part of the losses reported (1e-4 in arXiv:2204.02311).
        initializer_range: standard deviation of the embedding (and of an untied head) at initialisation; 0 stands
            for 0.5 / √hidden_size, so that logits begin with deviation 0.5 at every width.
        activation_checkpointing: "none", "full", "every-N" (each N-th block), "selective" (matrix products are
            kept, everything else is recomputed) or "deepspeed" (every block, by DeepSpeed's own function, which
            its "activation_checkpointing" section tells to partition or to offload).

    Raises:
        ValueError: one line for every setting that cannot work.
    """

    model_type = "globallocal"

    vocab_size: int = 50257
    hidden_size: int = 512
    num_hidden_layers: int = 6
    intermediate_size: int = 0
    max_position_embeddings: int = 512
    pool_size: int = 10000
    pool_dim: int = 0
    pool_seed: int = 0
    conv_kernel_size: int = 3
    conv_dilations: list[int] | list[list[int]] = field(default_factory=lambda: [1, 2, 4])
    router_top_k: int = 2
    router_temperature: float | int = 0.5
    router_hidden_size: int = 0
    router_scores: str = "dense"
    router_balance: float | int = 0.0
    router_context: str = "token"
    summary_heads: int = 0
    summary_key_size: int = 64
    summary_rule: str = "average"
    summary_key_heads: int = 1
    block_router: bool = True
    branch_gain: float | int = 1.0
    dropout: float | int = 0.0
    diversity_loss_scale: float | int = 0.01
    norm_placement: str = "pre"
    document_boundaries: str = "carry"
    layer_norm_eps: float | int = 1e-5
    tie_word_embeddings: bool = True
    head_bias: bool = True
    logit_soft_cap: float | int = 0.0
    z_loss: float | int = 0.0
    initializer_range: float | int = 0.0
    activation_checkpointing: str = "none"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if problems := setting_problems({name: getattr(self, name) for name in type(self).__annotations__}):
            raise ValueError("\n".join(problems))
        if self.intermediate_size == 0:
            self.intermediate_size = 4 * self.hidden_size
        if self.pool_dim == 0:
            self.pool_dim = 4 * self.hidden_size
        if self.router_hidden_size == 0:
            self.router_hidden_size = min(1024, self.pool_size)
        if self.summary_heads == 0:
            self.summary_heads = math.gcd(8, self.hidden_size)
        if self.initializer_range == 0:
            self.initializer_range = 0.5 / math.sqrt(self.hidden_size)
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GlobalLocalConfig":
        """The preset `name` with some settings replaced.

        Raises:
            ValueError: if no preset or setting has such a name, or a value cannot work: one line for each.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
        if problems := setting_problems(overrides):
            raise ValueError("\n".join(problems))
        return cls(**(PRESETS[name] | overrides))

    @property
    def routers_per_layer(self) -> int:
        """The attention's, and the block's own where it has one."""
        return 2 if self.block_router else 1

    def dilations_of_layer(self, layer: int) -> list[int]:
        """Dilations of the parallel convolutions of block `layer`."""
        schedule: list[Any] = self.conv_dilations
        dilations: list[int] = schedule[layer % len(schedule)] if self._cycles_dilations else schedule
        return dilations

    @property
    def _cycles_dilations(self) -> bool:
        return bool(self.conv_dilations) and isinstance(self.conv_dilations[0], list)

    @property
    def receptive_field(self) -> int:
        """Positions, the current one included, that the convolutions can carry to one output position.

        A running summary reaches all the way back, whatever this says.
        """
        reach = sum(max(self.dilations_of_layer(layer)) for layer in range(self.num_hidden_layers))
        return 1 + (self.conv_kernel_size - 1) * reach

    @property
    def document_ends(self) -> list[int]:
        """Ids behind which everything before is forgotten; none with `document_boundaries` "carry"."""
        if self.document_boundaries == "carry" or self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def product_key_shape(self) -> tuple[int, int]:
        """Keys on the left and the right: the two most equal factors of `pool_size`, the smaller first."""
        smaller = next(a for a in range(math.isqrt(self.pool_size), 0, -1) if self.pool_size % a == 0)
        return smaller, self.pool_size // smaller

    @property
    def _summary_parameters(self) -> int:
        """Weights and biases of all layers' running summaries."""
        if self.router_context != "summary":
            return 0
        h, keys = self.hidden_size, self.summary_key_heads * self.summary_key_size
        delta = self.summary_rule == "delta"
        outputs = 2 * keys + 2 * h + self.summary_heads * (2 if delta else 1)
        taps = SUMMARY_TAPS * (2 * keys + h) if delta else 0
        return self.num_hidden_layers * ((h + 1) * outputs + taps + (h + 1) * h)

    @property
    def _state_products(self) -> float:
        """Multiply-adds per token of all layers' summaries beside their weights.

        A state is written and read by every token, and half a chunk of tokens attended to; the delta rule also asks the
        state for what it holds, compares the keys of half a chunk, and solves for what each of them adds.
        """
        if self.router_context != "summary":
            return 0
        h, size, heads = self.hidden_size, self.summary_key_size, self.summary_heads
        if self.summary_rule == "average":
            return self.num_hidden_layers * (2 * size * h + SUMMARY_CHUNK / 2 * (size + h))
        inside = 2 * self.summary_key_heads * size + 2 * h + heads * size
        return self.num_hidden_layers * (3 * size * h + SUMMARY_CHUNK / 2 * inside)

    @property
    def _key_parameters(self) -> int:
        """Weights and biases of one router's keys."""
        if self.router_scores == "dense":
            return self.pool_size * (self.router_hidden_size + (2 if self.router_balance else 1))
        return sum(self.product_key_shape) * (self.router_hidden_size // 2 + 1)

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by part; their sum is the model's number of parameters.

        The tensor pool is not among them: it is a frozen buffer of `pool_size · pool_dim` elements.
        """
        h, layers, ffn = self.hidden_size, self.num_hidden_layers, self.intermediate_size
        dim, score = self.pool_dim, self.router_hidden_size
        router = (
            (h * score + score) + self._key_parameters + 1  # scores and temperature
            + (h * dim + dim) + 2 * dim  # input projection and its norm
            + (2 * dim * dim + dim) + (dim * h + h)  # mapping and output projection
        )  # fmt: skip
        branches = sum(len(self.dilations_of_layer(layer)) for layer in range(layers))
        convolution = branches * (self.conv_kernel_size * h * h + h) + branches * h * h + layers * h
        return {
            "embedding": self.vocab_size * h,
            "convolutions": convolution,
            "routers": layers * self.routers_per_layer * router,
            "summaries": self._summary_parameters,
            "gates": layers * (h + 1),
            "feed_forward": layers * (2 * h * ffn + ffn + h),
            "norms": ((1 + self.routers_per_layer) * layers + 1) * 2 * h,
            "head": self.vocab_size * (self.head_bias + (0 if self.tie_word_embeddings else h)),
        }

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating point operations of training (forward and backward) per token, matrix products only.

        Counted is what has to be done per token by the folded form: a multiply-add is 2 operations and the
        backward of a product costs two more products. The folds themselves (once per step, independent of the
        tokens), recomputation by activation checkpointing and element-wise work are not counted, so that a
        utilisation computed from it is never flattered.

        Args:
            sequence_length: for the interface's sake; it changes nothing.
        """
        del sequence_length
        h, dim, score = self.hidden_size, self.pool_dim, self.router_hidden_size
        branches = sum(len(self.dilations_of_layer(i)) for i in range(self.num_hidden_layers))
        convolution = branches * (self.conv_kernel_size + 1) * h * h
        # The input's two products, folded or not; the pool scores are needed in the forward pass only.
        router = 2 * h * min(h, dim) + dim * h + h * score + 2 * self.router_top_k * score
        routers = self.num_hidden_layers * self.routers_per_layer * router
        feed_forward = self.num_hidden_layers * 2 * h * self.intermediate_size
        rest = self._summary_parameters + self._state_products + self.num_hidden_layers * h + self.vocab_size * h
        trained = convolution + routers + feed_forward + rest
        forward_only = self.num_hidden_layers * self.routers_per_layer * self._key_parameters
        return 6.0 * trained + 2.0 * forward_only

    def _problems(self) -> list[str]:
        """Every pair of settings that cannot work together, one line each: value, bound, remedy."""
        problems = []
        if self.router_top_k > self.pool_size:
            problems.append(
                f"router_top_k is {self.router_top_k}, but the pool has only {self.pool_size} rows; "
                f"lower router_top_k or raise pool_size"
            )
        problems += self._score_problems()
        if self.hidden_size % self.summary_heads:
            problems.append(f"summary_heads is {self.summary_heads}; it must divide hidden_size, {self.hidden_size}")
        if self.summary_heads % self.summary_key_heads:
            problems.append(
                f"summary_key_heads is {self.summary_key_heads}; it must divide summary_heads, {self.summary_heads}"
            )
        if self.summary_key_heads > 1 and self.summary_rule != "delta":
            problems.append(
                f"summary_key_heads is {self.summary_key_heads}; more than one needs summary_rule 'delta', "
                f"and it is {self.summary_rule!r}"
            )
        if self.document_boundaries == "reset" and self.eos_token_id in (None, []):
            problems.append(
                f"document_boundaries is 'reset', which needs to know the token that ends a document, and eos_token_id "
                f"is {self.eos_token_id}; set eos_token_id, or document_boundaries to 'carry'"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(self, name)
            for token_id in given if isinstance(given, list) else [] if given is None else [given]:
                if not 0 <= token_id < self.vocab_size:
                    problems.append(
                        f"{name} is {short(token_id)}; it must be from 0 to vocab_size - 1, {self.vocab_size - 1}"
                    )
        return problems

    def _score_problems(self) -> list[str]:
        if self.router_scores == "dense":
            return []
        balance = f"router_balance is {self.router_balance}; it needs router_scores 'dense', or must be 0"
        problems = [balance] if self.router_balance else []
        if self.router_hidden_size % 2:
            problems.append(
                f"router_hidden_size is {self.router_hidden_size}; product keys halve it, so it must be even"
            )
        left, right = self.product_key_shape
        if right > 4 * left:
            root = math.isqrt(self.pool_size)
            problems.append(
                f"pool_size is {self.pool_size} = {left} × {right}; product keys need two factors within 4 times "
                f"of each other; nearest squares: {root**2}, {(root + 1) ** 2}"
            )
        return problems


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """One line for each name that is no setting of the model, and each value of another kind or out of its range."""
    known: dict[str, Any] = GlobalLocalConfig.__annotations__
    validators: dict[str, Any] = GlobalLocalConfig.__validators__  # type: ignore[attr-defined]
    problems = []
    for name, value in settings.items():
        if name not in known:
            problems.append(f"unknown model setting {name!r}; known settings: {', '.join(sorted(known))}")
        elif wanted := value_wanted(name, value, known[name], validators[name]):
            problems.append(f"{name} is {short(value)}; {wanted}")
    return problems

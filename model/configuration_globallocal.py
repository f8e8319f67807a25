"""The configuration of a GlobalLocal model: sizes, presets, parameter and FLOP counts.

Symbols used in the folder: B batch, S sequence, T = B·S tokens, h hidden_size, V vocab_size, N pool_size,
D pool_dim, R router_hidden_size, k router_top_k, K conv_kernel_size, L num_hidden_layers.
"""

import math
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ROUTERS_PER_LAYER = 2
SUMMARY_CHUNK = 64  # positions that attend to each other, before a state stands for them


@strict
class GlobalLocalConfig(PreTrainedConfig):
    """Settings of a GlobalLocal model; every one is written to `config.json`.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        intermediate_size: width of the feed-forward; 0 stands for 4 · hidden_size.
        max_position_embeddings: the longest sequence in tokens that training uses. There is no position
            table and no hard limit: longer inputs run at the same cost per token.
        pool_size: rows of the frozen tensor pool that all layers share.
        pool_dim: width of a pool row; 0 stands for 4 · hidden_size.
        pool_seed: the pool is a pure function of (pool_seed, pool_size, pool_dim).
        conv_kernel_size: taps of each causal convolution.
        conv_dilations: dilations of the parallel convolutions of a layer. One list serves all layers; a list
            of lists is cycled over the layers, for example [[1, 2, 4], [8, 16, 32]].
        router_top_k: pool rows that a token mixes.
        router_temperature: initial value of the learned temperature, held in 0.1 … 5.
        router_hidden_size: width of the score network's hidden layer; 0 stands for min(1024, pool_size).
        router_scores: "dense" (one key a pool row) or "product_key" (√pool_size keys a side, so that a pool of
            millions costs little more than one of thousands).
        router_context: what the global branch reads: "token" (the seed) or "summary" (the token and what it asks a
            running summary of everything before it, so that it sees the whole prefix at linear cost).
        summary_heads: parts of the summary that forget at rates of their own; 0 stands for gcd(8, hidden_size).
        summary_key_size: width of the summary's keys and queries: its state is summary_key_size · hidden_size
            numbers a layer.
        dropout: probability, applied where the seed applies it.
        diversity_loss_scale: factor of each router's loss; the sum over routers is scaled by a further 0.01.
        norm_placement: "pre" (norm in front of each sublayer) or "post" (norm after the residual sum).
        tie_word_embeddings: one matrix for the embedding and the head.
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
    router_context: str = "token"
    summary_heads: int = 0
    summary_key_size: int = 64
    dropout: float | int = 0.0
    diversity_loss_scale: float | int = 0.01
    norm_placement: str = "pre"
    layer_norm_eps: float | int = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.0
    activation_checkpointing: str = "none"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size == 0:
            self.intermediate_size = 4 * self.hidden_size
        if self.pool_dim == 0:
            self.pool_dim = 4 * self.hidden_size
        if self.router_hidden_size == 0:
            self.router_hidden_size = min(1024, self.pool_size)
        if self.summary_heads == 0:
            self.summary_heads = math.gcd(8, self.hidden_size)
        if self.initializer_range == 0 and self.hidden_size > 0:
            self.initializer_range = 0.5 / math.sqrt(self.hidden_size)
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GlobalLocalConfig":
        """The preset `name` with some settings replaced.

        Raises:
            ValueError: if no preset or setting has such a name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
        known = {setting.name for setting in fields(cls)}
        problems = [
            f"unknown model setting {key!r}; known settings: {', '.join(sorted(known))}"
            for key in overrides
            if key not in known
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return cls(**(PRESETS[name] | overrides))

    def dilations_of_layer(self, layer: int) -> list[int]:
        """Dilations of the parallel convolutions of block `layer`."""
        schedule: list = self.conv_dilations
        return schedule[layer % len(schedule)] if self._cycles_dilations else schedule

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
    def product_key_shape(self) -> tuple[int, int]:
        """Keys on the left and the right: the two most equal factors of `pool_size`, the smaller first."""
        smaller = next(a for a in range(math.isqrt(self.pool_size), 0, -1) if self.pool_size % a == 0)
        return smaller, self.pool_size // smaller

    @property
    def _summary_parameters(self) -> int:
        """Weights and biases of all layers' running summaries."""
        if self.router_context != "summary":
            return 0
        h = self.hidden_size
        outputs = 2 * self.summary_key_size + 2 * h + self.summary_heads
        return self.num_hidden_layers * ((h + 1) * outputs + (h + 1) * h)

    @property
    def _key_parameters(self) -> int:
        """Weights and biases of one router's keys."""
        if self.router_scores == "dense":
            return self.pool_size * (self.router_hidden_size + 1)
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
            "routers": layers * ROUTERS_PER_LAYER * router,
            "summaries": self._summary_parameters,
            "gates": layers * (h + 1),
            "feed_forward": layers * (2 * h * ffn + ffn + h),
            "norms": (3 * layers + 1) * 2 * h,
            "head": self.vocab_size + (0 if self.tie_word_embeddings else self.vocab_size * h),
        }

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating point operations of training (forward and backward) per token, matrix products only.

        Counted is what has to be done per token by the folded form: a multiply-add is 2 operations and the
        backward of a product costs two more products. The folds themselves (once a step, independent of the
        tokens), recomputation by activation checkpointing and element-wise work are not counted, so that a
        utilisation computed from it is never flattered.

        Args:
            sequence_length: kept for the interface's sake; the cost per token does not depend on it.
        """
        del sequence_length
        h, dim, score = self.hidden_size, self.pool_dim, self.router_hidden_size
        branches = sum(len(self.dilations_of_layer(i)) for i in range(self.num_hidden_layers))
        convolution = branches * (self.conv_kernel_size + 1) * h * h
        # The input's two products, folded or not; the pool scores are needed in the forward pass only.
        router = 2 * h * min(h, dim) + dim * h + h * score + 2 * self.router_top_k * score
        routers = self.num_hidden_layers * ROUTERS_PER_LAYER * router
        feed_forward = self.num_hidden_layers * 2 * h * self.intermediate_size
        # A state is written and read by every token, and half a chunk of tokens attended to.
        summary = 2 * self.summary_key_size * h + SUMMARY_CHUNK / 2 * (self.summary_key_size + h)
        summaries = self._summary_parameters + self.num_hidden_layers * summary * (self.router_context == "summary")
        rest = summaries + self.num_hidden_layers * h + self.vocab_size * h
        trained = convolution + routers + feed_forward + rest
        forward_only = self.num_hidden_layers * ROUTERS_PER_LAYER * self._key_parameters
        return 6.0 * trained + 2.0 * forward_only

    def _problems(self) -> list[str]:
        """Every setting that cannot work, one line each: value, bound, remedy."""
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in _POSITIVE_SIZES
            if getattr(self, name) < 1
        ]
        if self.router_top_k > self.pool_size:
            problems.append(
                f"router_top_k is {self.router_top_k}, but the pool has only {self.pool_size} rows; "
                f"lower router_top_k or raise pool_size"
            )
        schedules: list = self.conv_dilations if self._cycles_dilations else [self.conv_dilations]
        if not all(layer and min(layer) >= 1 for layer in schedules):
            problems.append(
                f"conv_dilations is {self.conv_dilations}; every layer needs one dilation or more, each at least 1"
            )
        problems += self._score_problems()
        if self.router_context not in ("token", "summary"):
            problems.append(f"router_context is {self.router_context!r}; it must be 'token' or 'summary'")
        if self.summary_heads < 1 or self.hidden_size % self.summary_heads:
            problems.append(f"summary_heads is {self.summary_heads}; it must divide hidden_size, {self.hidden_size}")
        if self.norm_placement not in ("pre", "post"):
            problems.append(f"norm_placement is {self.norm_placement!r}; it must be 'pre' or 'post'")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.initializer_range < 0:
            problems.append(
                f"initializer_range is {self.initializer_range}; it must be above 0, or 0 for 0.5 / √hidden_size"
            )
        if checkpointed_blocks(self.activation_checkpointing, 1) is None:
            problems.append(
                f"activation_checkpointing is {self.activation_checkpointing!r}; "
                f"it must be 'none', 'full', 'selective', 'deepspeed' or 'every-N' with N at least 1"
            )
        return problems

    def _score_problems(self) -> list[str]:
        if self.router_scores not in ("dense", "product_key"):
            return [f"router_scores is {self.router_scores!r}; it must be 'dense' or 'product_key'"]
        if self.router_scores == "dense" or self.pool_size < 1:
            return []
        problems = []
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


def checkpointed_blocks(policy: str, num_layers: int) -> list[bool] | None:
    """Which blocks recompute their activations under `policy`; None if there is no such policy."""
    if policy in ("full", "selective", "deepspeed", "none"):
        return [policy != "none"] * num_layers
    prefix, _, number = policy.partition("-")
    if prefix == "every" and number.isdigit() and int(number) > 0:
        return [layer % int(number) == 0 for layer in range(num_layers)]
    return None


_POSITIVE_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
    "pool_size", "pool_dim", "conv_kernel_size", "router_top_k", "router_hidden_size", "summary_key_size",
)  # fmt: skip

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

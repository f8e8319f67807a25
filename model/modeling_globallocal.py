"""The GlobalLocal language model: causal dilated convolutions, and routers over a frozen tensor pool.

Shapes and symbols as in `configuration_globallocal.py`; the equations are written out in `reference.py`.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from .configuration_globallocal import GlobalLocalConfig
from .decoding_globallocal import GlobalLocalCache, has_plain_weights, step_weights
from .documents_globallocal import document_offsets
from .graphs_globallocal import StepGraphs
from .layers_globallocal import CausalConvolution, DeltaSummary, FeedForward, GlobalLocalBlock, RunningSummary
from .library_globallocal import exporting
from .ops_loss_globallocal import soft_capped, vocabulary_loss
from .outputs_globallocal import GlobalLocalCausalLMOutput, GlobalLocalModelOutput
from .router_globallocal import RouterScores, TensorRouter
from .routing_globallocal import watched_routing
from .values_globallocal import checkpointed_blocks

# The seed scales each router's diversity loss by diversity_loss_scale, and their sum by this once more.
DIVERSITY_LOSS_TOTAL_SCALE = 0.01
TAPS_STD = 0.1  # of a short convolution


def make_pool(seed: int, pool_size: int, pool_dim: int) -> Tensor:
    """Random unit rows, float32 [N, D]: a pure function of its arguments, on every machine."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randn(pool_size, pool_dim, generator=generator, dtype=torch.float32, device="cpu")
    return rows / rows.norm(dim=-1, keepdim=True)


class GlobalLocalPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, shared by the model with and without a head."""

    config_class = GlobalLocalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GlobalLocalBlock"]  # noqa: RUF012
    _is_stateful = True  # the cache cannot be cut back to an earlier position

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *rest: Any, **more: Any) -> str:
        """Takes what frameworks ask for by default; there is no attention that it could change."""
        if attn_implementation in (None, "eager", "sdpa"):
            return "eager"
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}: GlobalLocal has no attention to replace; leave it out "
            "('eager' and 'sdpa' are taken, and change nothing)"
        )

    def compile(self, **options: Any) -> None:
        """Compiles block by block, for training: evaluation and decoding stay as they are.

        Blocks that differ in nothing but their weights share what was compiled. The choices of the compiler depend on
        no timing, so that every start computes the same bits.

        Args:
            options: for `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, GlobalLocalBlock):
                module.compile(fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights of deviation 1/√fan_in, those that write to the residual stream less by its depth."""
        residual = 1.0 / math.sqrt((1 + self.config.routers_per_layer) * self.config.num_hidden_layers)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            is_head = isinstance(module, LanguageModelHead)
            std = self.config.initializer_range if is_head else module.in_features**-0.5
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, TensorRouter | RouterScores):
            self._init_router(module, residual)
        elif isinstance(module, GlobalLocalModel):
            pool = make_pool(self.config.pool_seed, self.config.pool_size, self.config.pool_dim)
            init.copy_(module.pool, pool)
        if isinstance(module, CausalConvolution | FeedForward):  # their children were initialised before them
            init.normal_(module.projection.weight, std=residual * module.projection.in_features**-0.5)
        if isinstance(module, RunningSummary | DeltaSummary):  # half-lives from one token to about seven hundred
            behind = module.num_heads if isinstance(module, DeltaSummary) else 0  # the write gates: half of each value
            rest = module.input.out_features - module.num_heads - behind
            keep = torch.linspace(0.0, 7.0, module.num_heads)
            init.copy_(module.input.bias, torch.cat([torch.zeros(rest), keep, torch.zeros(behind)]))
        if isinstance(module, DeltaSummary):
            taps = TAPS_STD * torch.randn_like(module.taps)
            taps[-1] += 1.0  # near to handing on each position as it is
            init.copy_(module.taps, taps)
        if isinstance(module, CausalConvolution):
            init.normal_(module.branch_weight, std=module.branch_weight.shape[-1] ** -0.5)
            init.zeros_(module.branch_bias)

    def _init_router(self, router: nn.Module, residual: float) -> None:
        for name, parameter in router.named_parameters(recurse=False):
            if name.endswith("weight") and parameter.dim() == 2:
                gain = residual if name == "output_weight" else 1.0
                init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
            elif name == "input_norm_weight":
                init.ones_(parameter)
            elif name == "temperature":
                init.constant_(parameter, self.config.router_temperature)
            else:
                init.zeros_(parameter)


class GlobalLocalModel(GlobalLocalPreTrainedModel):
    """Embedding, blocks and final norm; owns the pool that all blocks read."""

    pool: Tensor  # float32 [N, D] until the model is cast; a buffer, saved with the weights

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.register_buffer("pool", torch.empty(config.pool_size, config.pool_dim))
        self.layers = nn.ModuleList(GlobalLocalBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = config.activation_checkpointing != "none"
        self._gradient_checkpointing_func = _checkpoint_function(config.activation_checkpointing)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: GlobalLocalCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
    ) -> GlobalLocalModelOutput:
        """Runs the blocks.

        Args:
            input_ids: int64 [B, S], or `inputs_embeds` [B, S, h].
            attention_mask: [B, ≥ S], 0 at padding; its last S columns belong to `input_ids`.
            cache: what an earlier call returned; these tokens then continue that sequence.
            use_cache: return a cache. The default is the config's in evaluation, and no in training.

        Raises:
            ValueError: neither or both of ids and embeddings, or embeddings where ids must tell documents apart.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :].unsqueeze(-1).to(x.dtype)
        by_itself = self.config.use_cache and not self.training and not exporting()
        if by_itself if use_cache is None else use_cache:
            cache = cache if cache is not None else GlobalLocalCache(len(self.layers))
        offsets, behind = self._document_offsets(input_ids, attention_mask, cache)
        recompute = self._recomputed_blocks(cache)
        all_states, diversity_losses, statistics = [x], [], []
        for layer, recomputed in zip(self.layers, recompute, strict=True):
            call = layer.__call__ if self.training else layer._call_impl  # hooks included, not what is compiled
            if recomputed:
                x, diversity, numbers = self._gradient_checkpointing_func(call, x, self.pool, mask, offsets)
            else:
                x, diversity, numbers = call(x, self.pool, mask, offsets, cache)
            diversity_losses.append(diversity)
            statistics.append(numbers)
            all_states.append(x)
        if cache is not None:
            cache.passed(x.shape[1], x.device)
            cache.offset = behind
        return GlobalLocalModelOutput(
            last_hidden_state=self.norm(x),
            diversity_loss=torch.stack(diversity_losses).sum() * DIVERSITY_LOSS_TOTAL_SCALE,
            router_statistics=_router_statistics(torch.stack(statistics), len(self.pool)),
            cache=cache,
            hidden_states=tuple(all_states) if output_hidden_states else None,
        )

    def _document_offsets(
        self, ids: Tensor | None, mask: Tensor | None, cache: GlobalLocalCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `document_offsets` has them; None where documents are not told apart."""
        if not (ends := self.config.document_ends):
            return None, None
        if ids is None:
            raise ValueError("document_boundaries is 'reset': documents are told apart by input_ids; give these")
        mask = None if mask is None else mask[:, -ids.shape[1] :]
        return document_offsets(ids, ends, mask, None if cache is None else cache.offset)

    def _recomputed_blocks(self, cache: GlobalLocalCache | None) -> list[bool]:
        on = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        policy = self.config.activation_checkpointing
        # Switched on by gradient_checkpointing_enable() alone: every block.
        blocks = checkpointed_blocks(policy if policy != "none" else "full", len(self.layers))
        return [on and chosen for chosen in blocks or []]


@torch.no_grad()
def _router_statistics(numbers: Tensor, pool_size: int) -> dict[str, Tensor]:
    """numbers [L, 1 + n · N], a row a block → see `GlobalLocalCausalLMOutput`; nothing is read by the host."""
    usage = numbers[:, 1:].unflatten(1, (-1, pool_size))
    fraction = usage / usage.sum(dim=-1, keepdim=True).clamp_min(1e-8)
    return {
        "gate_mean": numbers[:, 0],
        "pool_usage": usage,
        "pool_entropy_nats": torch.special.entr(fraction).sum(dim=-1),
        "pool_hit_rate": (usage > 0).to(usage.dtype).mean(dim=-1),
    }


def _checkpoint_function(policy: str) -> Callable[..., Any]:
    """torch.utils.checkpoint as the policy wants it; "selective" keeps the results of matrix products."""
    if policy == "deepspeed":
        # The block's input alone is an argument: what is partitioned or offloaded must not be the pool, once per layer.
        return lambda block, x, *rest: import_module("deepspeed").checkpointing.checkpoint(lambda y: block(y, *rest), x)
    if policy != "selective":
        return partial(checkpoint, use_reentrant=False)
    aten = torch.ops.aten
    # ZeRO-3's linear adds the bias in place: the kept product holds it already, and must not get it twice.
    kept = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.add_.Tensor]
    contexts = partial(create_selective_checkpoint_contexts, kept, allow_cache_entry_mutation=True)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


class LanguageModelHead(nn.Linear):
    """Linear [h] → [V], capped; with targets it returns losses instead, without ever holding the logits."""

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, config.head_bias)
        self.soft_cap, self.z_loss = float(config.logit_soft_cap), float(config.z_loss)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """hidden [B, S, h] → logits [B, S, V], or with targets int64 [B, S] the scalars of `vocabulary_loss`."""
        if targets is None:
            return soft_capped(super().forward(hidden), self.soft_cap)
        rows = hidden.flatten(0, -2), self.weight, self.bias, targets.flatten()
        return vocabulary_loss(*rows, self.soft_cap, self.z_loss)


class GlobalLocalForCausalLM(GlobalLocalPreTrainedModel, GenerationMixin):
    """GlobalLocal with a vocabulary head: trains, scores and generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GlobalLocalConfig) -> None:
        super().__init__(config)
        self.model = GlobalLocalModel(config)
        self.lm_head = LanguageModelHead(config)
        self._step_graphs = StepGraphs()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        cache: GlobalLocalCache | None = None,
        past_key_values: GlobalLocalCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_routing: bool = False,
        return_dict: bool = True,
    ) -> GlobalLocalCausalLMOutput | tuple[Any, ...]:
        """Logits, or a loss, or both.

        Args:
            input_ids: int64 [B, S], or `inputs_embeds` [B, S, h].
            attention_mask: [B, S], 0 at padding, on whichever side.
            labels: int64 [B, S], the Hugging Face way: equal to `input_ids`, shifted inside, −100 ignored.
            shift_labels: int64 [B, S], already shifted: the target of position t stands at t, −100 ignored.
                The training path: the loss is computed in blocks and no logits are returned.
            cache: what an earlier call returned (`past_key_values` is its older name).
            use_cache: return a cache. The default is the config's in evaluation, and no in training.
            logits_to_keep: logits of that many last positions only; 0 keeps all.
            output_routing: also return what each token read (`Routing`); not while training.

        One token with a cache, without mask and gradients, is a step: in place, and it returns logits and cache alone.

        Raises:
            ValueError: if both kinds of labels are given, or neither or both of ids and embeddings.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels (shifted inside) or shift_labels (already shifted), not both")
        cache = cache if cache is not None else past_key_values
        has_labels = labels is not None or shift_labels is not None
        plain = attention_mask is None and inputs_embeds is None and use_cache is not False
        if plain and not (has_labels or output_hidden_states or output_routing) and self._can_step(input_ids, cache):
            return self._step(input_ids, cache, return_dict)
        use_cache = False if use_cache is None and has_labels else use_cache
        with watched_routing(self.model) if output_routing else nullcontext() as watch:
            base = self.model(input_ids, attention_mask, inputs_embeds, cache, use_cache, output_hidden_states)
        hidden, objective, language_loss = base.last_hidden_state, None, None
        logits = self.lm_head(hidden[:, -logits_to_keep:]) if shift_labels is None else None
        if shift_labels is not None:
            objective, language_loss = self.lm_head(hidden, shift_labels)
        elif labels is not None:
            objective, language_loss = self.lm_head(hidden[:, :-1], labels[:, 1:])
        output = GlobalLocalCausalLMOutput(
            loss=None if objective is None else objective + base.diversity_loss,
            logits=logits,
            language_loss=language_loss,
            diversity_loss=base.diversity_loss,
            router_statistics=base.router_statistics,
            cache=base.cache,
            hidden_states=base.hidden_states,
            routing=None if watch is None else watch.routing(),
        )
        return output if return_dict else output.to_tuple()

    def _step(self, ids: Any, cache: Any, return_dict: bool) -> GlobalLocalCausalLMOutput | tuple[Any, ...]:
        """Logits behind one token more in each sequence: ids int64 [B, 1]."""
        logits = self._step_graphs.run(self, ids[:, 0], cache)
        cache.stepped()
        output = GlobalLocalCausalLMOutput(logits=logits, cache=cache)
        return output if return_dict else output.to_tuple()

    def _can_step(self, input_ids: Tensor | None, cache: GlobalLocalCache | None) -> bool:
        one = input_ids is not None and input_ids.shape[1] == 1
        if not one or cache is None or cache.position is None or self.training or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(cache.position.device.type):
            return False
        if cache.position.is_inference() and not torch.is_inference_mode_enabled():
            return False  # not to be changed in place here
        if cache.weights is None and has_plain_weights(self):
            cache.weights = step_weights(self, cache)
        return cache.weights is not None

    def train(self, mode: bool = True) -> Self:
        """As ever; training needs the memory of captured steps."""
        if mode:
            self._step_graphs.clear()
        return super().train(mode)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: GlobalLocalCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: GlobalLocalCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` gives to `forward`; a new token needs no mask, since only prompts hold padding."""
        cache = cache if cache is not None else past_key_values
        if cache is not None and next_sequence_length == 1 and not is_first_iteration:
            return {"input_ids": input_ids[:, -1:], "cache": cache} | kwargs
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            cache=cache,
            **kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """With a cache the mask need not grow. transformers before 5.20 reorders the cache by its older name."""
        if outputs.cache is None:
            return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["cache"] = model_kwargs["past_key_values"] = outputs.cache
        return model_kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the model brings its own cache."""
        return False


GlobalLocalConfig.register_for_auto_class()
GlobalLocalModel.register_for_auto_class("AutoModel")
GlobalLocalForCausalLM.register_for_auto_class("AutoModelForCausalLM")

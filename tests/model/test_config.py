"""Presets, counts and messages of the configuration."""

import pytest
import torch

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from model.presets_globallocal import PRESETS
from tests.model.helpers import tiny_config
from tests.model.preset_table import PAGE, preset_table

EXTRAS = {"router_scores": "product_key", "pool_size": 10_000, "router_context": "summary", "block_router": False}
DELTA = {"router_context": "summary", "summary_rule": "delta", "head_bias": False, "router_balance": 6.0}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, EXTRAS, DELTA])
def test_parameter_counts_are_the_real_ones(name, options):
    config = GlobalLocalConfig.from_preset(name, **options)
    with torch.device("meta"):
        model = GlobalLocalForCausalLM(config)
    counts = config.parameter_counts()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    real = {
        "summaries": sum(p.numel() for n, p in model.named_parameters() if ".summary." in n),
        "routers": sum(p.numel() for n, p in model.named_parameters() if ".router." in n),
        "convolutions": sum(p.numel() for n, p in model.named_parameters() if ".local." in n),
        "feed_forward": sum(p.numel() for n, p in model.named_parameters() if ".feed_forward." in n),
        "gates": sum(p.numel() for n, p in model.named_parameters() if ".gate." in n),
    }
    assert real == {part: counts[part] for part in real}


@pytest.mark.parametrize("name", ["small", "base", "large", "xl"])
def test_the_convolutions_of_the_larger_presets_reach_over_the_whole_sequence(name):
    config = GlobalLocalConfig.from_preset(name)
    assert config.receptive_field >= config.max_position_embeddings


@pytest.mark.parametrize(("name", "millions"), [("small", 45), ("base", 125), ("large", 350), ("xl", 1300)])
def test_presets_have_the_sizes_that_their_names_promise(name, millions):
    config = GlobalLocalConfig.from_preset(name)
    assert sum(config.parameter_counts().values()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_the_page_shows_the_presets_as_they_are():
    assert preset_table() in PAGE.read_text(), "python -m tests.model.preset_table"


def test_seed_preset_has_the_size_of_the_seed():
    config = GlobalLocalConfig.from_preset("seed")
    assert config.vocab_size == 50257
    assert round(sum(config.parameter_counts().values()) / 1e6, 1) == 338.3
    assert config.pool_size * config.pool_dim == 20_480_000


def test_flops_follow_from_the_matrices():
    """Six operations per weight that a token meets; the scores' matrix has no backward of its own."""
    config = tiny_config(tie_word_embeddings=False, router_top_k=1)
    counts = config.parameter_counts()
    routers, h = config.num_hidden_layers * 2, config.hidden_size
    dense = counts["convolutions"] + counts["feed_forward"] + counts["head"]
    folded = 2 * h * h + h * config.pool_dim + h * config.router_hidden_size
    scores = config.router_hidden_size * config.pool_size
    estimate = 6 * (dense + routers * folded) + 2 * routers * scores
    assert config.flops_per_token(128) == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize(
    ("dilations", "kernel_size", "expected"),
    [([1], 3, 1 + 2 * 2), ([1, 2, 4], 3, 1 + 2 * 8), ([[1, 2], [8, 16]], 2, 1 + 2 + 16), ([7], 1, 1)],
)
def test_receptive_field(dilations, kernel_size, expected):
    assert tiny_config(conv_dilations=dilations, conv_kernel_size=kernel_size).receptive_field == expected


def test_dilation_lists_are_cycled_over_the_layers():
    config = tiny_config(conv_dilations=[[1, 2], [4], [8]], num_hidden_layers=5)
    assert [config.dilations_of_layer(i) for i in range(5)] == [[1, 2], [4], [8], [1, 2], [4]]


def test_derived_sizes_and_a_round_trip(tmp_path):
    config = GlobalLocalConfig(hidden_size=48, pool_size=300)
    assert (config.intermediate_size, config.pool_dim, config.router_hidden_size) == (192, 192, 300)
    config.save_pretrained(tmp_path)
    loaded = GlobalLocalConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="num_hidden_layers is 0") as caught:
        tiny_config(
            norm_placement="middle",
            router_context="all",
            router_temperature=0,
            dropout=1.0,
            logit_soft_cap=0.5,
            z_loss=-1,
            initializer_range=-0.1,
            conv_dilations=[[1], []],
            activation_checkpointing="every-0",
            num_hidden_layers=0,
            pool_size=10**30,
            layer_norm_eps=float("nan"),
        )
    assert str(caught.value).splitlines() == [
        "num_hidden_layers is 0; it must be at least 1",
        "pool_size is 1000000000000000000000000000000; it must be at most 2147483647",
        "conv_dilations is [[1], []]; every layer needs one dilation or more, each from 1 to 2147483647",
        "router_temperature is 0; it must be at least 0.1",
        "router_context is 'all'; it must be 'token' or 'summary'",
        "dropout is 1.0; it must be at least 0 and below 1",
        "norm_placement is 'middle'; it must be 'pre' or 'post'",
        "layer_norm_eps is nan; it must be from 1e-12 to 1",
        "logit_soft_cap is 0.5; it must be at least 1, or 0 for no cap",
        "z_loss is -1; it must be at least 0",
        "initializer_range is -0.1; it must be at least 1e-06, or 0 for 0.5 / √hidden_size",
        "activation_checkpointing is 'every-0'; "
        "it must be 'none', 'full', 'selective', 'deepspeed' or 'every-N' with N at least 1",
    ]


def test_all_pairs_that_contradict_are_named_at_once():
    with pytest.raises(ValueError, match="router_top_k is 9") as caught:
        tiny_config(
            router_top_k=9,
            pool_size=4,
            router_scores="product_key",
            router_balance=6.0,
            summary_heads=5,
            summary_key_heads=2,
            eos_token_id=[3, 31],
            pad_token_id=-1,
        )
    assert str(caught.value).splitlines() == [
        "router_top_k is 9, but the pool has only 4 rows; lower router_top_k or raise pool_size",
        "router_balance is 6.0; it needs router_scores 'dense', or must be 0",
        "router_hidden_size is 9; product keys halve it, so it must be even",
        "summary_heads is 5; it must divide hidden_size, 12",
        "summary_key_heads is 2; it must divide summary_heads, 5",
        "summary_key_heads is 2; more than one needs summary_rule 'delta', and it is 'average'",
        "eos_token_id is 31; it must be from 0 to vocab_size - 1, 30",
        "pad_token_id is -1; it must be from 0 to vocab_size - 1, 30",
    ]


def test_values_of_another_kind_are_named_at_once():
    wrong = {
        "hidden_size": "big",
        "num_hidden_layers": 32.5,
        "pool_size": None,
        "pool_dim": True,
        "dropout": "none",
        "conv_dilations": ["a"],
        "tie_word_embeddings": "x" * 100_000,
    }
    with pytest.raises(ValueError, match="hidden_size is 'big'") as caught:
        GlobalLocalConfig.from_preset("quickstart", **wrong)
    lines = str(caught.value).splitlines()
    assert lines[:-1] == [
        "hidden_size is 'big'; it must be a whole number",
        "num_hidden_layers is 32.5; it must be a whole number",
        "pool_size is None; it must be a whole number",
        "pool_dim is True; it must be a whole number",
        "dropout is 'none'; it must be a number",
        "conv_dilations is ['a']; it must be a list of whole numbers, or a list of such lists",
    ]
    assert lines[-1].endswith("; it must be true or false")
    assert len(lines[-1]) < 200


def test_product_keys_need_a_pool_with_two_similar_factors():
    assert tiny_config(router_scores="product_key", pool_size=100_000, router_hidden_size=8).product_key_shape == (
        250,
        400,
    )
    with pytest.raises(ValueError, match="router_hidden_size is 9") as caught:
        tiny_config(router_scores="product_key", pool_size=10_007)
    assert str(caught.value).splitlines() == [
        "router_hidden_size is 9; product keys halve it, so it must be even",
        "pool_size is 10007 = 1 × 10007; product keys need two factors within 4 times of each other; "
        "nearest squares: 10000, 10201",
    ]
    with pytest.raises(ValueError, match="router_scores is 'sparse'; it must be 'dense' or 'product_key'"):
        tiny_config(router_scores="sparse")


def test_product_keys_cost_the_square_root_of_the_pool():
    def scores_flops(pool_size, scores):
        options = {"router_scores": scores, "router_hidden_size": 64}
        config = tiny_config(pool_size=pool_size, **options)
        return config.flops_per_token(1) - tiny_config(pool_size=4, **options).flops_per_token(1)

    assert scores_flops(10**6, "dense") > 90 * scores_flops(10**4, "dense")
    assert scores_flops(10**6, "product_key") < 12 * scores_flops(10**4, "product_key")
    assert scores_flops(10**6, "product_key") < scores_flops(10**6, "dense") / 400


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown model preset 'smal'; known presets: quickstart, seed, small"):
        GlobalLocalConfig.from_preset("smal")
    with pytest.raises(ValueError, match=r"unknown model setting 'hiden_size'; known settings: .*hidden_size"):
        GlobalLocalConfig.from_preset("small", hiden_size=3)

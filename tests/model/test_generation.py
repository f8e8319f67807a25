"""Decoding with the constant-size cache equals decoding without."""

import pytest
import torch

from tests.model.helpers import make_model, random_ids, tiny_config

CONFIG = {"eos_token_id": 30, "pad_token_id": 0, "bos_token_id": 1}


def prompt_ids(config, batch, length, seed=1):
    """No padding id inside: `generate` would take it for padding."""
    return random_ids(config, batch, length, seed).clamp_min(1)


@pytest.fixture(scope="module", params=["token", "summary"])
def model(request):
    return make_model(tiny_config(router_context=request.param, **CONFIG), noise=0.3)


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 7},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_generate_is_the_same_with_cache_without_and_left_padded(model, strategy):
    ids = prompt_ids(model.config, 2, 6)
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    results = []
    for inputs, options in ((ids, {}), (ids, {"use_cache": False}), (padded, {"attention_mask": mask})):
        torch.manual_seed(0)
        results.append(model.generate(inputs, max_new_tokens=20, **options, **strategy)[:, inputs.shape[1] :])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_prompts_of_different_lengths_in_one_batch(model):
    prompts = [prompt_ids(model.config, 1, length, length) for length in (2, 7, 11)]
    width = 11
    batch = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        assert torch.equal(row[width : width + len(alone)], alone)


@pytest.mark.parametrize("pieces", [[13], [1] * 13, [5, 1, 7], [12, 1]])
def test_any_split_of_a_sequence_gives_the_same_logits(model, pieces):
    ids = prompt_ids(model.config, 2, 13)
    cache, parts = None, []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    assert (torch.cat(parts, dim=1) - model(ids, use_cache=False).logits).abs().max() < 1e-12
    assert cache.get_seq_length() == 13


def test_cache_does_not_grow(model):
    def cache_bytes(cache):
        states = [t for t in (*cache.history, *cache.summary) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in states)

    first = model(prompt_ids(model.config, 1, 3), use_cache=True).cache
    size = cache_bytes(first)
    later = model(prompt_ids(model.config, 1, 200), cache=first, use_cache=True).cache
    assert cache_bytes(later) == size
    assert [t.shape[1] for t in later.history] == [4, 8]  # (K − 1) · the largest dilation of each layer


def test_training_does_not_build_a_cache(model):
    ids = prompt_ids(model.config, 1, 5)
    assert model(ids, shift_labels=ids).cache is None
    assert model(ids).past_key_values is not None
    model.train()
    assert model(ids).cache is None
    model.eval()


def test_logits_to_keep(model):
    ids = prompt_ids(model.config, 2, 9)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], atol=1e-12)

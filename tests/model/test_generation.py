"""Decoding with the constant-size cache equals decoding without."""

import copy
import gc

import pytest
import torch

from model import decoding_globallocal as decoding
from model import graphs_globallocal as graphs
from tests.model.helpers import LAYOUTS, make_model, random_ids, repeated, tiny_config

CONFIG = {"eos_token_id": 30, "pad_token_id": 0, "bos_token_id": 1}


def prompt_ids(config, batch, length, seed=1):
    """No padding id inside: `generate` would take it for padding."""
    return random_ids(config, batch, length, seed).clamp_min(1)


@pytest.fixture(scope="module", params=["token", "summary", "delta"])
def model(request):
    return make_model(tiny_config(**LAYOUTS[request.param], **CONFIG), noise=0.3)


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
        states = [t for t in (*cache.history, *cache.summary, *cache.recent) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in states)

    first = model(prompt_ids(model.config, 1, 3), use_cache=True).cache
    size = cache_bytes(first)
    later = model(prompt_ids(model.config, 1, 200), cache=first, use_cache=True).cache
    assert cache_bytes(later) == size
    assert [t.shape[1] for t in later.history] == [5, 9]  # 1 + (K − 1) · the largest dilation of each layer


def decoded(model, ids, pieces, cache=None):
    """Logits of all pieces, one call each, and the cache."""
    parts = []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_steps_in_place_give_the_logits_of_the_whole_sequence(layout):
    model = make_model(tiny_config(**LAYOUTS[layout]), noise=0.3)
    ids = random_ids(model.config, 3, 40)
    logits, cache = decoded(model, ids, [5] + [1] * 20 + [3] + [1] * 12)
    assert (logits - model(ids, use_cache=False).logits).abs().max() < 1e-12
    states = [cache.position, *cache.history, *cache.summary, *cache.recent]
    later = model(ids[:, :1], cache=cache).cache
    same = [later.position, *later.history, *later.summary, *later.recent]
    assert all(a is b for a, b in zip(states, same, strict=True))


@torch.no_grad()
def test_a_step_does_no_more_than_needed(model):
    """Steps reach the module's parameters themselves: not where somebody gathers or replaces them on the way."""
    ids = random_ids(model.config, 2, 4)
    _, cache = decoded(model, ids, [3, 1])
    assert model(ids[:, :1], cache=cache).router_statistics is None
    hooked = copy.deepcopy(model)
    hooked.model.layers[0].feed_forward.register_forward_pre_hook(lambda module, inputs: None)
    assert decoding.has_plain_weights(model)
    assert not decoding.has_plain_weights(hooked)
    expected, _ = decoded(model, ids, [3, 1])
    assert (decoded(hooked, ids, [3, 1])[0] - expected).abs().max() < 1e-12
    with torch.enable_grad():
        logits, _ = decoded(model, ids, [1, 1, 1, 1])
        assert torch.autograd.grad(logits.sum(), model.model.embed_tokens.weight)[0].abs().sum() > 0


@torch.no_grad()
def test_beams_are_reordered_between_steps(model):
    ids = random_ids(model.config, 3, 12)
    _, cache = decoded(model, ids[:, :8], [5, 1, 1, 1])
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    rest = ids[:, 8:]
    whole = torch.cat([ids[order, :8], rest], dim=1)
    logits, _ = decoded(model, rest, [1, 1, 1, 1], cache)
    assert (logits - model(whole, use_cache=False).logits[:, 8:]).abs().max() < 1e-12


def test_a_cache_goes_on_where_generate_ended(model):
    ids = prompt_ids(model.config, 2, 6)
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    first = model.generate(ids, return_dict_in_generate=True, **options)
    cache = first.cache if hasattr(first, "cache") else first.past_key_values
    assert cache.get_seq_length() == ids.shape[1] + 3  # the last token was not run
    question = torch.cat([first.sequences, prompt_ids(model.config, 2, 3, seed=5)], dim=1)
    again = model.generate(question, cache=cache, **options)
    assert torch.equal(again, model.generate(question, **options))


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def replaying(request, monkeypatch):
    """A device on which steps are replayed: from a CUDA graph, or on the CPU by running them anew."""
    monkeypatch.setitem(graphs.CAPTURES, "cpu", repeated)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_replayed_steps_give_the_logits_of_the_whole_sequence(layout, replaying):
    """Rows are rounded up; caches take turns on a graph, and several tokens come between steps."""
    model = make_model(tiny_config(**LAYOUTS[layout]), noise=0.3).to(replaying)
    caches = dict.fromkeys((3, 4, 6))
    ids = {rows: random_ids(model.config, rows, 30).to(replaying) for rows in caches}
    whole = {rows: model(ids[rows], use_cache=False).logits for rows in caches}
    at = 0
    for pieces in ([5, 1, 1, 1], [1, 1], [4, 1, 1], [1] * 14):
        end = at + sum(pieces)
        for rows in caches:
            logits, caches[rows] = decoded(model, ids[rows][:, at:end], pieces, caches[rows])
            assert (logits - whole[rows][:, at:end]).abs().max() < 1e-10
        at = end
    assert at == 30
    assert sorted(model._step_graphs._graphs) == [4, 8]


def test_graphs_are_kept_between_calls_and_follow_the_weights(model, replaying):
    model = copy.deepcopy(model).to(replaying)
    ids = prompt_ids(model.config, 2, 6).to(replaying)

    def generate(**options):
        return model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options).cpu()

    outcomes, memory = [], []
    for _ in range(3):
        outcomes.append(generate())
        gc.collect()
        memory.append(torch.cuda.memory_allocated() if replaying == "cuda" else 0)
    graph = model._step_graphs._graphs[2]
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[0], generate(use_cache=False))
    assert memory[1] == memory[2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)  # where they lie
    assert torch.equal(generate(), generate(use_cache=False))
    assert model._step_graphs._graphs[2] is graph
    model.float()  # elsewhere
    assert torch.equal(generate(), generate(use_cache=False))
    assert model._step_graphs._graphs[2] is not graph
    assert torch.equal(generate(num_beams=3), generate(num_beams=3, use_cache=False))
    assert not copy.deepcopy(model)._step_graphs._graphs
    model.train()
    assert not model._step_graphs._graphs


@torch.no_grad()
def test_decoding_goes_on_where_capturing_fails(model, monkeypatch, caplog):
    def refuses(run, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = copy.deepcopy(model)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", refuses)
    ids = random_ids(model.config, 2, 9)
    logits, _ = decoded(model, ids, [4, 1, 1, 1, 1, 1])
    assert (logits - model(ids, use_cache=False).logits).abs().max() < 1e-12
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without a CUDA graph: operation not permitted when stream is capturing"
    ]


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

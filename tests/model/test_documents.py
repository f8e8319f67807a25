"""Documents told apart: one behind an end of text is what it is alone, in training and in decoding."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ops_delta_globallocal, ops_summary_globallocal
from model.documents_globallocal import document_offsets
from tests.model.helpers import APART, LAYOUTS, make_model, random_ids, tiny_config

ENDS = APART["eos_token_id"]
CONTEXTS = ["token", "summary", "delta", "delta with keys per head"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """So that a document spans several of them, and several lie in one."""
    for module in (ops_delta_globallocal, ops_summary_globallocal):
        monkeypatch.setattr(module, "SUMMARY_CHUNK", 8)


def documents(row):
    """What stands between ends of text, each of which is its document's last token."""
    cuts = [i + 1 for i, token in enumerate(row.tolist()) if token in ENDS and i + 1 < len(row)]
    return [piece.unsqueeze(0) for piece in row.tensor_split(cuts)]


def text(batch, length, share_of_ends, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (batch, length), generator=generator)
    ends = torch.randint(0, 2, (batch, length), generator=generator).mul(4).add(3)
    return torch.where(torch.rand(batch, length, generator=generator) < share_of_ends, ends, ids)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 30),
    share_of_ends=st.sampled_from([0.1, 0.3, 1.0]),
    kernel_size=st.integers(1, 4),
    context=st.sampled_from(CONTEXTS),
    seed=st.integers(0, 99),
)
def test_packed_documents_are_what_they_are_alone(batch, length, share_of_ends, kernel_size, context, seed):
    layout = LAYOUTS[context] | {"conv_kernel_size": kernel_size}
    packed, alone = make_model(tiny_config(**layout, **APART), seed), make_model(tiny_config(**layout), seed)
    ids = text(batch, length, share_of_ends, seed)
    logits = packed(ids).logits
    expected = torch.cat([torch.cat([alone(piece).logits for piece in documents(row)], dim=1) for row in ids])
    assert (logits - expected).abs().max() < 1e-10
    weights = torch.randn_like(logits)
    gradients = torch.autograd.grad(logits, packed.parameters(), weights, allow_unused=True)
    goals = torch.autograd.grad(expected, alone.parameters(), weights, allow_unused=True)
    for gradient, goal in zip(gradients, goals, strict=True):
        assert (gradient is None) == (goal is None)
        assert gradient is None or (gradient - goal).abs().max() <= 1e-10 * goal.abs().max().clamp_min(1)


@settings(max_examples=25)
@given(
    pieces=st.lists(st.sampled_from([1, 1, 2, 9]), min_size=1, max_size=12),
    context=st.sampled_from(CONTEXTS),
    share_of_ends=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_sequence_in_any_parts_gives_the_same_logits(pieces, context, share_of_ends, seed):
    """Parts of one token are steps in place; rows end their documents at different places, and change places."""
    model = make_model(tiny_config(**LAYOUTS[context], **APART), seed, noise=0.3)
    ids = text(3, sum(pieces), share_of_ends, seed)
    whole, cache = model(ids, use_cache=False).logits, None
    for at, piece in zip(accumulate(pieces, initial=0), pieces, strict=False):
        output = model(ids[:, at : at + piece], cache=cache, use_cache=True)
        assert (output.logits - whole[:, at : at + piece]).abs().max() < 1e-10
        cache, order = output.cache, torch.randperm(3, generator=torch.Generator().manual_seed(at))
        cache.reorder_cache(order)
        ids, whole = ids[order], whole[order]


@torch.no_grad()
def test_rows_join_a_batch_from_the_middle_of_their_documents():
    model = make_model(tiny_config(**LAYOUTS["delta"], **APART), noise=0.3)
    ids, starts = text(2, 20, 0.3, seed=4), [3, 8]
    rows = [model(ids[i : i + 1, :start], use_cache=True).cache for i, start in enumerate(starts)]
    cache = rows[0]
    cache.append(rows[1])
    for step in range(12):
        tokens = torch.stack([ids[i, start + step : start + step + 1] for i, start in enumerate(starts)])
        logits = model(tokens, cache=cache).logits
        for i, start in enumerate(starts):
            whole = model(ids[i : i + 1, : start + step + 1], use_cache=False).logits
            assert (logits[i] - whole[0, -1:]).abs().max() < 1e-10


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_passes_an_end_of_text(context):
    model = make_model(tiny_config(**LAYOUTS[context], **APART))
    ids = random_ids(model.config, 1, 30).clamp_min(8)
    ids[0, 13] = 3
    edited = ids.clone()
    edited[0, :13] = 9
    with torch.no_grad():
        before, after = model(ids).logits, model(edited).logits
    assert not torch.equal(before[:, 13], after[:, 13])  # the end itself is told by what it ends
    assert (before[:, 14:] - after[:, 14:]).abs().max() < 1e-12
    whole = make_model(tiny_config(**LAYOUTS[context]))(ids).logits
    assert torch.allclose(before[:, :14], whole[:, :14], atol=1e-12)
    assert not torch.allclose(before[:, 14:], whole[:, 14:], atol=1e-3)


def test_padding_ends_no_document():
    """A prompt's padding, or that of a later turn, may be the token that ends a text."""
    ids = torch.tensor([[5, 3, 6, 3, 3, 8]])
    offsets, behind = document_offsets(ids, ENDS)
    assert offsets.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert behind.tolist() == [[1]]
    offsets, behind = document_offsets(ids, ENDS, torch.tensor([[1, 0, 1, 1, 0, 1]]), torch.tensor([[4]]))
    assert offsets.tolist() == [[4, 5, 6, 7, 0, 1]]
    assert behind.tolist() == [[2]]
    model = make_model(tiny_config(**LAYOUTS["delta, documents apart"], pad_token_id=3))
    prompt = random_ids(model.config, 1, 6).clamp_min(8)
    padded, mask = (torch.nn.functional.pad(x, (4, 0), value=v) for x, v in ((prompt, 3), (torch.ones_like(prompt), 0)))
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), expected)


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match=r"document_boundaries is 'reset'.*eos_token_id is None; set eos_token_id"):
        tiny_config(document_boundaries="reset")
    model = make_model(tiny_config(**APART))
    with pytest.raises(ValueError, match="documents are told apart by input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 12, dtype=torch.float64))

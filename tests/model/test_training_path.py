"""What training relies on: losses, activation checkpointing, determinism, sharded weights, compilation."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from model.modeling_globallocal import GlobalLocalForCausalLM
from model.router_globallocal import TensorRouter
from tests.model.helpers import LAYOUTS, make_model, random_ids, tiny_config
from tests.variants import some_of


def loss_and_gradients(model, ids, labels, seed=7):
    model.zero_grad()
    torch.manual_seed(seed)  # for the dropout
    output = model(ids, shift_labels=labels)
    output.loss.backward()
    return output, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("layout", ["token", "delta, documents apart"])
@pytest.mark.parametrize("policy", ["full", "every-2", "every-3", "selective"])
def test_activation_checkpointing_changes_nothing(policy, layout):
    settings = {"num_hidden_layers": 4, "dropout": 0.3, "diversity_loss_scale": 50.0} | LAYOUTS[layout]
    plain = make_model(tiny_config(**settings)).train()
    recomputing = GlobalLocalForCausalLM(tiny_config(activation_checkpointing=policy, **settings)).double()
    recomputing.load_state_dict(plain.state_dict())
    ids, labels = random_ids(plain.config, 3, 9), random_ids(plain.config, 3, 9, 2)
    expected, expected_gradients = loss_and_gradients(plain, ids, labels)
    output, gradients = loss_and_gradients(recomputing.train(), ids, labels)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.diversity_loss, expected.diversity_loss)
    assert output.diversity_loss > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_kept_products_stand_the_linear_that_zero_3_puts_in_place_of_the_usual_one(monkeypatch):
    """It adds the bias into the product's own memory; stage 3 sets it for the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    plain = make_model(tiny_config(), dtype=torch.float32).train()
    recomputing = make_model(tiny_config(activation_checkpointing="selective"), dtype=torch.float32).train()
    ids, labels = random_ids(plain.config, 3, 9), random_ids(plain.config, 3, 9, 2)
    expected, expected_gradients = loss_and_gradients(plain, ids, labels)
    output, gradients = loss_and_gradients(recomputing, ids, labels)
    assert torch.equal(output.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def saved_bytes(model, ids):
    """Distinct bytes that the graph of one loss keeps alive, parameters aside."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, shift_labels=ids)
    return sum(kept.values())


def test_activation_checkpointing_saves_memory():
    sizes = {}
    for policy in ("none", "every-2", "full"):
        config = tiny_config(num_hidden_layers=6, activation_checkpointing=policy)
        model = make_model(config).train()
        sizes[policy] = saved_bytes(model, random_ids(config, 8, 64))
    assert sizes["full"] < sizes["every-2"] / 2 < sizes["none"] / 2


def test_hugging_face_switch_turns_checkpointing_on_and_off():
    model = make_model(tiny_config()).train()
    ids = random_ids(model.config, 8, 64)
    before = saved_bytes(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
        assert saved_bytes(model, ids) < before / 2
        model.gradient_checkpointing_disable()
    assert saved_bytes(model, ids) == before


def test_no_logits_and_no_pool_scores_are_kept():
    config = tiny_config(vocab_size=5000, pool_size=3000, num_hidden_layers=1, tie_word_embeddings=False)
    model = make_model(config, dtype=torch.float32)
    tokens = 8 * 64
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(random_ids(config, 8, 64), shift_labels=random_ids(config, 8, 64))
    assert max(kept) < tokens * 3000 / 4
    assert max(kept) == 5000 * config.hidden_size  # the head's gradient


def test_labels_are_shifted_inside_and_shift_labels_are_not():
    model = make_model(tiny_config())
    ids = random_ids(model.config, 2, 9)
    ids[0, 4] = 3
    labels = ids.clone()
    labels[1, :5] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.language_loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert output.loss.item() == pytest.approx((output.language_loss + output.diversity_loss).item(), abs=0)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    training = model(ids, shift_labels=shifted)
    assert training.logits is None
    assert training.loss.item() == pytest.approx(output.loss.item(), abs=1e-12)
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=labels, shift_labels=shifted)


def test_a_z_loss_of_capped_logits_is_in_what_training_descends_alone():
    model = make_model(tiny_config(z_loss=0.1, logit_soft_cap=1.5))
    ids, labels = random_ids(model.config, 2, 9), random_ids(model.config, 2, 9, 2)
    logits, output = model(ids).logits, model(ids, shift_labels=labels)
    assert logits.abs().max() < 1.5
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert output.language_loss.item() == pytest.approx(expected.item(), abs=1e-12)
    more = (output.loss - output.language_loss - output.diversity_loss).item()
    assert more == pytest.approx(0.1 * logits.logsumexp(dim=-1).square().mean().item(), abs=1e-12)


def test_a_batch_without_targets_has_loss_zero_and_finite_gradients():
    model = make_model(tiny_config())
    ids = random_ids(model.config, 2, 5)
    output, gradients = loss_and_gradients(model, ids, torch.full_like(ids, -100))
    assert output.language_loss.item() == 0.0
    assert all(torch.isfinite(g).all() for g in gradients)


def test_gradient_of_a_scaled_loss_is_scaled():
    """Loss scaling and accumulation multiply the loss; the vocabulary loss has its gradient already."""
    model = make_model(tiny_config())
    ids = random_ids(model.config, 2, 5)
    model(ids, shift_labels=ids).loss.backward()
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(ids, shift_labels=ids).loss * 1024.0).backward()
    assert all(
        torch.allclose(p.grad, 1024.0 * g, rtol=1e-12, atol=1e-15)
        for p, g in zip(model.parameters(), once, strict=True)
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_the_same_from_run_to_run(threads):
    config = tiny_config(hidden_size=64, pool_size=50, pool_dim=64, vocab_size=500, dropout=0.1)
    model = make_model(config, dtype=torch.float32, noise=0.05).train()
    ids = random_ids(config, 4, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, first_gradients = loss_and_gradients(model, ids, ids)
        for _ in range(3):
            output, gradients = loss_and_gradients(model, ids, ids)
            assert torch.equal(output.loss, first.loss)
            assert all(torch.equal(a, b) for a, b in zip(gradients, first_gradients, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["summary", "delta", "product keys"])
def test_every_module_needs_its_own_parameters_only(layout):
    """ZeRO-3 hands out a module's direct parameters around its forward; everything else is empty."""
    model = make_model(tiny_config(tie_word_embeddings=False, **LAYOUTS[layout]))
    ids = random_ids(model.config, 2, 9)
    expected = model(ids, shift_labels=ids).loss.item()
    whole = {name: parameter.data for name, parameter in model.named_parameters()}

    def gather(prefix):
        def hook(module, _):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data = whole[f"{prefix}.{name}"]

        return hook

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=torch.float64)

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(gather(prefix))
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        assert model(ids, shift_labels=ids).loss.item() == pytest.approx(expected, rel=1e-14)


def test_router_statistics_show_the_state_of_the_routers():
    config = tiny_config(router_top_k=1)
    model = make_model(config)
    healthy = model(random_ids(config, 8, 32)).router_statistics
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TensorRouter):
                module.scores.get_parameter("keys_bias")[3] = 1e6  # every token takes row 3
            if isinstance(module, torch.nn.Linear) and module.out_features == 1:
                torch.nn.init.constant_(module.bias, 50.0)  # every gate is open for the local branch
    collapsed = model(random_ids(config, 8, 32)).router_statistics
    assert healthy["gate_mean"].shape == (2,)
    assert healthy["pool_hit_rate"].shape == healthy["pool_entropy_nats"].shape == (2, 2)
    assert (healthy["pool_hit_rate"] > 1.5 / 17).all()
    assert (healthy["pool_entropy_nats"] <= math.log(17)).all()
    assert torch.allclose(collapsed["pool_hit_rate"], torch.full((2, 2), 1 / 17, dtype=torch.float64))
    assert torch.allclose(collapsed["pool_entropy_nats"], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.allclose(collapsed["gate_mean"], torch.ones(2, dtype=torch.float64))
    assert not any(t.requires_grad for t in healthy.values())


@pytest.mark.parametrize(
    ("layout", "pool_dim"),  # narrower and wider than the model
    some_of(
        [("token", 8), ("summary, documents apart", 40), ("delta, documents apart", 8)],
        [("token", 40), ("summary", 8), ("delta", 40)],
    ),
)
def test_compiles_without_graph_breaks(layout, pool_dim):
    settings = LAYOUTS[layout] | {"num_hidden_layers": 1, "pool_dim": pool_dim}
    model = make_model(tiny_config(**settings), dtype=torch.float32).train()
    ids = random_ids(model.config, 2, 9)
    expected, expected_gradients = loss_and_gradients(model, ids, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(ids, shift_labels=ids)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for parameter, goal in zip(model.parameters(), expected_gradients, strict=True):
        assert torch.allclose(parameter.grad, goal, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "full", "every-2"])
def test_blocks_share_one_graph_which_evaluation_does_not_use(policy):
    dilations = [[1, 2], [4, 8], [16, 3]]
    config = tiny_config(
        num_hidden_layers=3, router_context="summary", conv_dilations=dilations, activation_checkpointing=policy
    )
    model = make_model(config, dtype=torch.float32).train()
    ids = random_ids(config, 2, 9)
    _, expected = loss_and_gradients(model, ids, ids)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for _ in range(3):
        _, gradients = loss_and_gradients(model, ids, ids)
        assert graphs["unique_graphs"] == 1
    for gradient, goal in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, goal, rtol=1e-3, atol=1e-5)
    model.eval()
    with torch.no_grad():
        model(ids)
    model(ids, shift_labels=ids).loss.backward()
    assert graphs["unique_graphs"] == 1

"""Saving, loading in a process that has never heard of this project, tied weights, the pool."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers.utils import is_accelerate_available

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM, make_pool
from tests.model.helpers import make_model, random_ids, tiny_config

LOAD_ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "model" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print("RESULT", json.dumps({
        "class": type(model).__module__.split(".")[0],
        "logits": model(ids).logits.tolist(),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "generated": model.generate(ids, max_new_tokens=5, do_sample=False).tolist(),
    }))
"""


def test_loads_in_a_fresh_process_from_the_folder_alone(tmp_path):
    models = {}
    for tied in (True, False):
        config = tiny_config(tie_word_embeddings=tied, norm_placement="post" if tied else "pre")
        models[tied] = make_model(config, dtype=torch.float32)
        models[tied].save_pretrained(tmp_path / f"tied-{tied}")
    ids = random_ids(config, 2, 9)
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    # -I: neither this project nor the working folder can be imported by accident.
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, json.dumps(ids.tolist())]
    command += [str(tmp_path / f"tied-{tied}") for tied in models]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("RESULT") for line in result.stdout.splitlines() if line.startswith("RESULT")]
    for line, (tied, model) in zip(lines, models.items(), strict=True):
        loaded = json.loads(line)
        assert loaded["class"] == "transformers_modules"
        assert loaded["tied"] == tied
        assert torch.allclose(torch.tensor(loaded["logits"]), model(ids).logits, atol=1e-5)
        assert loaded["generated"] == model.generate(ids, max_new_tokens=5, do_sample=False).tolist()


def test_what_frameworks_ask_of_attention_is_taken_or_refused_in_one_line(tmp_path):
    make_model(tiny_config(), dtype=torch.float32).save_pretrained(tmp_path)
    ids = random_ids(tiny_config(), 1, 5)
    plain = GlobalLocalForCausalLM.from_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        model = GlobalLocalForCausalLM.from_pretrained(tmp_path, attn_implementation=name, dtype=torch.float32)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="'flash_attention_2': GlobalLocal has no attention to replace") as refused:
        GlobalLocalForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert "\n" not in str(refused.value)


def test_other_usual_arguments_are_taken_or_name_what_they_need(tmp_path):
    make_model(tiny_config(), dtype=torch.float32).save_pretrained(tmp_path)
    ids = random_ids(tiny_config(), 1, 5)
    for asked, given in (("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
        assert GlobalLocalForCausalLM.from_pretrained(tmp_path, dtype=asked)(ids).logits.dtype == given
    for place in ("cpu", "auto"):
        if is_accelerate_available():
            assert GlobalLocalForCausalLM.from_pretrained(tmp_path, device_map=place)(ids).logits.isfinite().all()
            continue
        with pytest.raises(ValueError, match="requires `accelerate`") as refused:
            GlobalLocalForCausalLM.from_pretrained(tmp_path, device_map=place)
        assert "\n" not in str(refused.value)


def test_every_tensor_is_stored_once(tmp_path):
    model = make_model(tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert sum("pool" in name for name in names) == 1
    assert names == set(model.state_dict()) - {"lm_head.weight"}


def test_pool_comes_from_its_seed_alone(tmp_path):
    torch.manual_seed(1)
    first = GlobalLocalForCausalLM(tiny_config(pool_seed=5))
    torch.manual_seed(2)
    second = GlobalLocalForCausalLM(tiny_config(pool_seed=5, vocab_size=99))
    other = GlobalLocalForCausalLM(tiny_config(pool_seed=6))
    assert torch.equal(first.model.pool, second.model.pool)
    assert not torch.equal(first.model.pool, other.model.pool)
    assert torch.allclose(first.model.pool.norm(dim=1), torch.ones(17))
    assert not first.model.pool.requires_grad
    assert torch.equal(first.to(torch.bfloat16).model.pool, make_pool(5, 17, 10).to(torch.bfloat16))


def test_pool_survives_loading_even_when_it_was_changed(tmp_path):
    model = make_model(tiny_config(), dtype=torch.float32)
    model.model.pool.mul_(2.0)  # the file rules, not the seed
    model.save_pretrained(tmp_path)
    loaded = GlobalLocalForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.pool, model.model.pool)
    for (name, value), (_, expected) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def test_pool_missing_from_a_file_is_made_anew_from_the_seed(tmp_path):
    model = make_model(tiny_config(pool_seed=7), dtype=torch.float32)
    state = {k: v for k, v in model.state_dict().items() if k != "model.pool"}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = GlobalLocalForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.pool, make_pool(7, 17, 10))


def test_initial_weights_are_finite_and_the_first_loss_is_that_of_a_guess():
    config = tiny_config(vocab_size=512, hidden_size=64, num_hidden_layers=6)
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    ids = random_ids(config, 4, 32)
    # Logits of deviation 0.5 cost half their variance more than a uniform guess.
    guess = math.log(512) + 0.5**2 / 2
    assert abs(model(ids, shift_labels=random_ids(config, 4, 32, 2)).loss.item() - guess) < 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_logits_begin_with_deviation_one_half_at_every_width(width, tied):
    config = GlobalLocalConfig.from_preset(
        "quickstart", hidden_size=width, num_hidden_layers=1, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = GlobalLocalForCausalLM(config).eval()
    with torch.no_grad():
        logits = model(random_ids(config, 2, 32)).logits
    assert logits.std().item() == pytest.approx(0.5, rel=0.1)


def test_same_seed_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(GlobalLocalForCausalLM(tiny_config()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

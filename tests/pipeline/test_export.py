"""A run becomes a folder for people who never saw this project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.transformers
import pytest
import torch

from data_prep.errors import UserError
from pipeline.checkpoints.fingerprint import probe_ids
from pipeline.export.hugging_face import export
from pipeline.export.load import load_model
from pipeline.tracking.models import folder_hash
from tests.conftest import globallocal

STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
assert not any(name.split(".")[0] in ("model", "pipeline", "data_prep", "launch") for name in sys.modules)
plain = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
assert "transformers_modules" not in sys.modules  # none of the folder's code ran, and nobody was asked
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("The history of", add_special_tokens=False, return_tensors="pt").input_ids
assert plain("The history of", add_special_tokens=False).input_ids == ids[0].tolist()
print(model(input_ids=ids).logits.sum().item())
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0]))
"""


@pytest.fixture(scope="module")
def exported(runs: dict[str, Any], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "export"
    export(trained / "unbroken-3", output)
    return output


def test_the_folder_is_complete(exported: Path) -> None:
    names = {item.name for item in exported.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "README.md",
        "modeling_globallocal.py",
        "configuration_globallocal.py",
    }
    assert not any(name.startswith(".") for name in names)
    assert "AutoModelForCausalLM" in json.loads((exported / "config.json").read_text())["auto_map"]
    card = (exported / "README.md").read_text()
    assert "| optimizer steps | 6 |" in card
    assert "| loss in nats | 6." in card


def test_an_export_is_a_model_of_its_run_and_registered_loads_back(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    store, output = f"sqlite:///{trained}/mlflow.db", tmp_path / "export"
    registered = ["--register", "tests", "--alias", "champion"]
    globallocal("export", trained / "unbroken-3", "--output", output, *registered)
    client = mlflow.MlflowClient(store, registry_uri=store)
    version = client.get_model_version_by_alias("tests", "champion")
    state = json.loads((trained / "unbroken-3" / "checkpoints" / "step-00000006" / "state.json").read_text())
    (found,) = client.get_run(version.run_id).outputs.model_outputs
    model = client.get_logged_model(found.model_id)
    assert model.source_run_id == state["mlflow_run_id"]
    assert model.name == "unbroken-3-step-6"
    assert model.tags["globallocal.step"] == "6"
    assert model.tags["globallocal.sha256"] == folder_hash(output) == folder_hash(exported)
    values = {metric.key: metric.value for metric in model.metrics}
    assert values["model/loss/valid"] == pytest.approx(state["evaluation"]["loss"])
    run = client.get_run(state["mlflow_run_id"])
    assert [(item.model_id, item.step) for item in run.outputs.model_outputs] == [(model.model_id, 6)]
    assert run.info.status == "FINISHED"
    mlflow.set_tracking_uri(store)
    try:
        loaded = mlflow.transformers.load_model("models:/tests@champion", return_type="components")["model"].eval()
    finally:
        mlflow.set_tracking_uri(None)
    ids = probe_ids(loaded.config.vocab_size)
    ours = load_model(trained / "unbroken-3").model.eval()
    for name, weight in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    with torch.no_grad():  # the same weights; where they lie in memory changes the last bits of a product
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_an_alias_needs_a_name(trained: Path, tmp_path: Path) -> None:
    done = globallocal("export", trained / "unbroken-3", "--output", tmp_path / "x", "--alias", "champion", expect=2)
    assert "give --register NAME too" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_stranger_loads_it_without_this_project(exported: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(exported)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    warnings = [line for line in run.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert warnings == []
    total, text = run.stdout.split("\n", 1)
    loaded = load_model(exported)
    ids = loaded.tokenizer("The history of", add_special_tokens=False, return_tensors="pt").input_ids
    assert float(total) == pytest.approx(loaded.model(input_ids=ids).logits.sum().item(), abs=1e-3)
    assert text.startswith("The history of")


@pytest.mark.parametrize("run", ["unbroken-0", "unbroken-1", "unbroken-2", "unbroken-3", "unbroken-bf16", "tied"])
def test_every_stage_consolidates_to_the_weights_that_were_trained(
    runs: dict[str, Any], trained: Path, run: str
) -> None:
    """The checkpoint's own fingerprint: logits of the engine on a fixed probe, at the step that was saved."""
    loaded = load_model(trained / run)
    assert loaded.state is not None
    with torch.no_grad():
        logits = loaded.model(input_ids=probe_ids(loaded.model.config.vocab_size)).logits[0, -1, :64]
    bound = 0.05 if run == "unbroken-bf16" else 1e-5
    assert logits.tolist() == pytest.approx(loaded.state.logit_fingerprint.values, abs=bound)


def test_an_existing_folder_is_not_overwritten(exported: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="exists; remove it, or choose another --output"):
        export(trained / "unbroken-3", exported)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder, nor a checkpoint, nor an exported model"):
        load_model(tmp_path)


def test_evaluate_and_generate_read_run_and_export_alike(
    exported: Path, runs: dict[str, Any], trained: Path, small_dataset: Path
) -> None:
    words = ["--max-samples", 8, "--json", "-"]
    of_run = json.loads(globallocal("evaluate", trained / "unbroken-3", *words, "--record").stdout)
    of_export = json.loads(globallocal("evaluate", exported, "--dataset", small_dataset, *words).stdout)
    assert (of_run["step"], of_export["step"]) == (6, None)
    assert of_run["datasets"] == of_export["datasets"]
    client = mlflow.MlflowClient(f"sqlite:///{trained}/mlflow.db")
    state = json.loads((trained / "unbroken-3" / "checkpoints" / "step-00000006" / "state.json").read_text())
    run, name = client.get_run(state["mlflow_run_id"]), of_run["datasets"][0]["name"]
    recorded = run.data.metrics[f"evaluated/{name}/valid/blocks-32-first-8/loss"]
    assert recorded == pytest.approx(of_run["datasets"][0]["loss"])
    assert run.data.metrics["loss/valid"] == pytest.approx(state["evaluation"]["loss"])
    assert run.info.status == "FINISHED"
    one, two = (globallocal("generate", exported, "--prompt", "The", "--max-new-tokens", 5).stdout for _ in range(2))
    assert one == two
    assert one.startswith("The")

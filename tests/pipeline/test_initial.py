"""A new run begins with the weights of an exported model, once."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch

from data_prep.errors import UserError
from data_prep.hashing import hash_file
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.export.initial import begin_with, check_initial
from pipeline.export.load import load_model
from tests.pipeline.ranks import Run, run_ranks


def test_it_begins_with_the_weights_on_other_data_lengths_and_goes_on_without_them(
    tiny_export: Path, small_dataset: Path, tmp_path: Path
) -> None:
    still = ["model.conv_dilations=[[1,2],[4]]", "data.sequence_length=16", "optimizer.learning_rate=1.0e-9"]
    nowhere = tmp_path / "nowhere"
    plan = [
        Run("begun", [*still, f"training.init_from={tiny_export}"]),
        Run("went-on", [*still, f"training.init_from={nowhere}"], copy_checkpoint="begun/step-00000003"),
    ]
    results = run_ranks(plan, tmp_path, small_dataset, 1)
    assert [result["problems"] for result in results] == [[], []]
    begun = load_model(tmp_path / "begun" / "checkpoints" / "step-00000003")
    for name, expected in load_model(tiny_export).model.state_dict().items():
        torch.testing.assert_close(begun.model.state_dict()[name], expected, rtol=1e-5, atol=1e-5)
    weights = hash_file(tiny_export / "model.safetensors")
    for run in ("begun", "went-on"):
        state = json.loads((tmp_path / run / "checkpoints" / "step-00000006" / "state.json").read_text())
        assert state["begun_from"] == {"folder": str(tiny_export), "sha256": {"model.safetensors": weights}}
    tags = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(state["mlflow_run_id"]).data.tags
    assert tags["globallocal.init_from"] == str(tiny_export)
    assert tags["globallocal.init_from_sha256"] == weights


def test_another_vocabulary_and_another_model_are_refused_by_name(tiny_export: Path, tmp_path: Path) -> None:
    own = GlobalLocalConfig.from_pretrained(tiny_export)
    sha256 = hash_file(tiny_export / "tokenizer.model")
    check_initial(tiny_export, own, sha256)
    free = GlobalLocalConfig.from_pretrained(tiny_export, dropout=0.3, max_position_embeddings=4096)
    check_initial(tiny_export, free, sha256)
    other = GlobalLocalConfig.from_pretrained(tiny_export, hidden_size=64, summary_heads=4)
    with pytest.raises(UserError) as refused:
        check_initial(tiny_export, other, "f" * 64)
    vocabulary, *settings = refused.value.problems
    assert "its vocabulary is another: tokenizer " in vocabulary
    assert f"--tokenizer {tiny_export}" in vocabulary
    assert [line.rpartition("; ")[2] for line in settings] == ["set model.hidden_size=32", "set model.summary_heads=8"]
    with pytest.raises(UserError, match="is no exported model; make one with `globallocal export"):
        check_initial(tmp_path, own, sha256)


def test_weights_that_are_not_whole_are_refused(tiny_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read: .*; export it again"):
        begin_with(GlobalLocalForCausalLM(GlobalLocalConfig.from_pretrained(folder)), folder)

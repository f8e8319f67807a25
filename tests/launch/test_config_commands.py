"""`globallocal config`: where settings come from, where two runs differ, the schema that editors complete from."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch.cli import main
from launch.settings.origins import settings_of
from launch.settings.schema import model_descriptions, run_schema
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.config import known_keys, load_config
from tests.conftest import ROOT

RUN_FILES = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
QUICKSTART = "launch/runs/quickstart.yaml"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_each_value_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(shown(capsys, "show", "quickstart", "training.max_steps=70", "model.dropout=0.5", "--json"))
    assert said["training.max_steps"] == {"value": 70, "origin": "command line"}
    assert said["model.dropout"] == {"value": 0.5, "origin": "command line"}
    lines = (ROOT / QUICKSTART).read_text().splitlines()
    file, _, line = said["optimizer.warmup_steps"]["origin"].rpartition(":")
    assert (file, lines[int(line) - 1].strip()) == (QUICKSTART, "warmup_steps: 20")
    assert said["model.hidden_size"] == {"value": 192, "origin": "preset quickstart"}
    assert said["model.intermediate_size"] == {"value": 768, "origin": "derived"}
    assert said["data.verify"] == {"value": "hashes", "origin": "default"}
    assert set(said) | {f"model.{name}" for name in GlobalLocalConfig.__annotations__} == set(known_keys())


def test_what_is_shown_is_a_run_file_of_the_same_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for source in RUN_FILES:
        (tmp_path / source.name).write_text(shown(capsys, "show", str(source)))
        assert main(["config", "diff", str(source), str(tmp_path / source.name)]) == 0
        capsys.readouterr()


def test_of_a_run_folder_what_differs_from_the_defaults_has_a_line(tmp_path: Path) -> None:
    load_config(QUICKSTART, ["tracking.uri=http://me:SECRET@host"]).save(tmp_path / "config.yaml")
    found = settings_of(tmp_path, ["run.seed=3"])
    assert found["training.max_steps"].origin.startswith(f"{tmp_path / 'config.yaml'}:")
    assert found["training.precision"].origin == "default"
    assert found["run.seed"].origin == "command line"
    assert "SECRET" not in str(found)


def test_two_runs_that_differ_are_told_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "diff", "quickstart", "launch/runs/seed.yaml", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["training.max_epochs"] == {"one": None, "other": 3.0}
    assert said["model.norm_placement"] == {"one": "pre", "other": "post"}
    assert "training.precision" not in said
    assert main(["config", "diff", "quickstart", "launch/runs/seed.yaml"]) == 1
    assert "norm_placement" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "quikstart"], "quikstart: no such file; there are: launch/runs/quickstart.yaml"),
        (["show", "quickstart", "training.max_step=1"], "unknown key training.max_step; nearest: training.max_steps"),
        (["show", "docs"], "docs: holds no config.yaml, so it is no run folder; globallocal runs FOLDER lists runs"),
        (["show", "quickstart", "data.dataset="], "data.dataset"),
        (["diff", "quickstart"], "Missing argument"),
    ],
)
def test_mistakes_are_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_shipped_schema_is_that_of_the_types(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails: `globallocal config schema > launch/runs/schema.json`."""
    assert (ROOT / "launch" / "runs" / "schema.json").read_text() == shown(capsys, "schema")


def test_every_run_file_names_the_schema_and_keeps_to_it() -> None:
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for file in RUN_FILES:
        name = file.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
        assert (file.parent / name).is_file()
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("training", {"max_step": 1}),
        ("model", {"hiden_size": 1}),
        ("model", {"preset": "huge"}),
        ("model", {"hidden_size": 0}),
        ("model", {"router_temperature": 6}),
        ("model", {"summary_rule": "mean"}),
        ("model", {"dropout": 1.0}),
        ("model", {"conv_dilations": [[1, 0]]}),
        ("model", {"activation_checkpointing": "every-0"}),
        ("data", {"sequence_length": 0}),
        ("training", {"precision": "int8"}),
    ],
)
def test_the_schema_refuses_what_the_types_refuse(section: str, wrong: dict[str, object]) -> None:
    values = yaml.safe_load((ROOT / QUICKSTART).read_text())
    values[section] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, run_schema())


def test_the_models_settings_have_words() -> None:
    unsaid = set(GlobalLocalConfig.__annotations__) - set(model_descriptions())
    assert unsaid <= {"layer_norm_eps", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}

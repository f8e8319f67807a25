"""Settings: what is accepted, and the words in which the rest is refused."""

from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.config import known_keys, load_config, validate

SHIPPED = sorted(Path("launch/runs").glob("*.yaml"))


def problems_of(*overrides: str, path: str = "launch/runs/quickstart.yaml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_shipped_run_files_load() -> None:
    assert len(SHIPPED) >= 3
    for path in SHIPPED:
        config = load_config(path)
        assert config.model.build(vocab_size=1000).hidden_size > 0
        assert config.deepspeed.config.is_file()


def test_overrides_replace_settings_of_the_file() -> None:
    config = load_config("launch/runs/quickstart.yaml", ["training.max_steps=70", "model.hidden_size=96"])
    assert config.training.max_steps == 70
    assert config.model.build(vocab_size=300).hidden_size == 96


def test_a_number_like_6e_3_is_a_number() -> None:
    assert load_config("launch/runs/quickstart.yaml", ["optimizer.learning_rate=6e-3"]).optimizer.learning_rate == 0.006


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.max_step=3", "unknown key training.max_step; nearest: training.max_steps"),
        ("trianing.max_steps=3", "unknown key trianing; nearest: training"),
        ("model.hidden_sise=3", "unknown key model.hidden_sise; nearest: model.hidden_size"),
        ("data.max_steps=3", "training.max_steps"),
        ("model.preset=huge", "model.preset: 'huge' is not a preset; known: "),
        ("training.global_batch_size=0", "training.global_batch_size = 0: input should be greater than or equal to 1"),
        ("training.precision=int8", "training.precision = 'int8': input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("training.max_epochs=1", "exactly one of max_steps (300) and max_epochs (1.0) must be set"),
        ("--training.max_steps=3", "is not an override; write section.key=value"),
        ("run.name=a/b", "run.name = 'a/b': string should match pattern"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(override: str, line: str) -> None:
    (problem,) = problems_of(override)
    assert line in problem


def test_all_mistakes_are_told_at_once() -> None:
    problems = problems_of("training.max_step=3", "data.sequence_length=0", "model.pool=1", "checkpoint.keep_last=x")
    assert len(problems) == 4


def test_a_missing_file_names_those_that_are_there() -> None:
    (problem,) = problems_of(path="launch/runs/quikstart.yaml")
    assert "no such file; there are: " in problem
    assert "launch/runs/quickstart.yaml" in problem


def test_broken_yaml_is_a_line_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("run: [1, 2\n")
    (problem,) = problems_of(path=str(path))
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem


def test_required_sections_are_named() -> None:
    with pytest.raises(UserError) as caught:
        validate({"run": {"name": "x"}}, "somewhere")
    assert caught.value.problems == ["somewhere: data is required", "somewhere: training is required"]


def test_every_setting_has_a_dotted_key_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config("launch/runs/quickstart.yaml")
    assert "training.max_steps" in config.flat()
    assert set(known_keys()) >= {key for key in config.flat() if not key.startswith("model.")}
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config

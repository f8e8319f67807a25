"""The short form of `make torture ARGS=inputs`: a part of its wrong settings, and all pairs that contradict."""

from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.config import load_config
from tests.torture.inputs_settings import PAIRS, cases, faults

STRIDE = 13  # prime to the number of values, so that every field and every value is met


def test_every_wrong_setting_is_a_line_or_is_taken_as_it_was_given(small_dataset: Path, tmp_path: Path) -> None:
    every = list(cases())
    some = every[::STRIDE][:260] + every[-len(PAIRS) :]
    assert len(some) >= 300
    assert faults(some, small_dataset, tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n- b\n", "holds no settings"),
        (b"run: {name: \xff\xfe}\n", "is not UTF-8"),
        (b"run: [1, 2\n", "see launch/runs/quickstart.yaml for the form"),
        (b"run: {name: a}\nrun: {name: b}\n", "run"),
        (b"", "data is required"),
        (b"run: ${nothing}\n", "nothing"),
    ],
)
def test_a_file_that_is_no_run_file_is_a_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert any(said in problem for problem in caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)


def test_a_key_that_stands_twice_in_the_json_is_refused(tmp_path: Path) -> None:
    from pipeline.engine.deepspeed_json import read_deepspeed_json

    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(UserError, match="stage stands twice in one object; remove one"):
        read_deepspeed_json(path)

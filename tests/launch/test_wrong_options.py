"""The short form of `make torture ARGS="inputs"`: some of its commands with wrong options."""

from pathlib import Path

from tests.torture.inputs_commands import cases, commands, faults

STRIDE = 13  # prime to the number of values, so that every option and every value is met


def test_every_command_with_wrong_options_ends_in_one_line_a_problem(tmp_path: Path) -> None:
    every = list(cases())
    assert {case.words[0] for case in every[::STRIDE]} == {words[0] for words in commands()}
    assert faults(every[::STRIDE], tmp_path) == []

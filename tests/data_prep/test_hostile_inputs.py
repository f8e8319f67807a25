"""The short form of `make torture ARGS="inputs"`: every twelfth odd file and faulty answer."""

from pathlib import Path

from tests.torture.inputs_data import run


def test_odd_files_and_faulty_servers_end_right_or_in_plain_lines(tmp_path: Path) -> None:
    figures = run(tmp_path, share=12)
    assert figures["broke the rule"] == 0
    assert figures["ended with the right documents"]
    assert figures["refused in plain lines"]

"""The short form of `make torture ARGS="inputs"`: some of its files and faulty answers; and what it found."""

from pathlib import Path

import pytest

from data_prep import remote
from data_prep.errors import LONGEST_LINE, UserError
from data_prep.remote_file import open_file
from tests.data_prep.faulty_servers import s3_server
from tests.torture.inputs_data import run, short_waits


def test_odd_files_and_faulty_servers_end_right_or_in_plain_lines(tmp_path: Path) -> None:
    figures = run(tmp_path, share=12, slow_share=37)
    assert figures["broke the rule"] == 0
    assert figures["ended with the right documents"]
    assert figures["refused in plain lines"]


def test_a_problem_is_one_line_whatever_a_library_says() -> None:
    assert UserError("a.parquet: cannot be read (one\ntwo); restore it").problems == [
        "a.parquet: cannot be read (one two); restore it"
    ]
    (line,) = UserError("x" * 10_000 + ": no such file").problems
    assert len(line) == LONGEST_LINE
    assert line.endswith("xxx: no such file")


def test_s3_is_asked_as_often_as_any_server() -> None:
    """Its two clients ask again by themselves too, which would multiply a silent server's minutes."""
    with s3_server({"a.txt": b"a"}) as (server, root), short_waits():
        assert remote.read_whole(f"{root}/a.txt") == b"a"
        for fault in ("503", "stalls"):
            with server.answering(fault, 1000) as faults:
                with pytest.raises(remote.UnreachableError, match="after 8 tries"):
                    remote.file_size(f"{root}/a.txt")
                assert faults() == 8


def test_an_answer_of_s3_that_is_not_what_was_asked_for_is_never_taken_for_text() -> None:
    text = b"word " * 1000
    with s3_server({"a.txt": text}) as (server, root), short_waits():
        for fault in ("204", "a page", "too much"):
            with server.answering(fault, 2, "GET"):
                assert open_file(f"{root}/a.txt", len(text)).read() == text
            with server.answering(fault, 1e9, "GET"), pytest.raises(UserError, match=r"truncated or changed.*8 tries"):
                open_file(f"{root}/a.txt", len(text)).read()

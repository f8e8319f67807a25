"""Hostfiles: every wrong line with its number; includes and excludes that leave something."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from launch.hosts.hostfile import read_hostfile, select


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_order_comments_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# two nodes\n\nworker-1 slots=8   # the big one\n10.0.0.2\tslots=4\n")
    assert list(read_hostfile(path).items()) == [("worker-1", 8), ("10.0.0.2", 4)]


def test_every_wrong_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, "a slots=2\nb lots=2\nc\na slots=4\nd slots=0\ne slots=2 f\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert [line.removeprefix(f"{path}:") for line in caught.value.problems] == [
        "2: 'b lots=2' is not HOST slots=N (N ≥ 1)",
        "3: 'c' is not HOST slots=N (N ≥ 1)",
        "4: a is named a second time; give all its slots in one line",
        "5: 'd slots=0' is not HOST slots=N (N ≥ 1)",
        "6: 'e slots=2 f' is not HOST slots=N (N ≥ 1)",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_no_host(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="names no host; write one line per machine: HOST slots=N"):
        read_hostfile(write(tmp_path, text))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(tmp_path / "absent")


HOSTS = {"a": 2, "b": 4, "c": 8}


def test_include_keeps_the_order_of_the_file() -> None:
    assert select(HOSTS, include="c,a") == {"a": 2, "c": 8}
    assert select(HOSTS, include="c@a") == {"a": 2, "c": 8}


@given(st.sets(st.sampled_from("abc"), min_size=1, max_size=2))
def test_include_and_exclude_are_opposites(names: set[str]) -> None:
    joined = ",".join(sorted(names))
    kept, left = select(HOSTS, include=joined), select(HOSTS, exclude=joined)
    assert kept.keys() == names
    assert kept | left == HOSTS
    assert not kept.keys() & left.keys()


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("d", "", "d is not in the hostfile, which names a, b, c"),
        ("", "a,b,c", "--exclude a,b,c leaves no host of a, b, c"),
        ("a", "b", "--include a and --exclude b: give one of them"),
    ],
)
def test_selections_that_cannot_be(include: str, exclude: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        select(HOSTS, include, exclude)
    assert caught.value.problems == [said]

"""The spool: what was appended is read, whatever happened to the process or the disk."""

import json
import string
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

from pipeline.tracking.history import NAME_LENGTH, History, clean_name
from pipeline.tracking.spool import Spool
from tests.pipeline.tracking_fixtures import file_size_limit


def records(spool: Spool) -> list[dict | None]:
    return [record for record, _ in spool.read(0)]


@given(st.lists(st.dictionaries(st.text(), st.text(st.characters()) | st.integers() | st.floats(-1, 1)), max_size=8))
def test_records_come_back_in_order_from_any_offset(tmp_path_factory, payloads: list[dict]) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool") / "spool.jsonl")
    written = [{"kind": "tags", "values": payload} for payload in payloads]
    for record in written:
        spool.append(record)
    read = list(spool.read(0))
    assert [record for record, _ in read] == written
    for i, (_, behind) in enumerate(read):
        assert [record for record, _ in spool.read(behind)] == written[i + 1 :]
    assert spool.size_bytes == (read[-1][1] if read else 0)
    spool.close()


def test_a_line_cut_by_a_crash_is_passed_over_at_every_byte(tmp_path: Path) -> None:
    whole = json.dumps({"kind": "metrics", "step": 1, "time": 0, "values": {"loss": 2.5}}).encode()
    for cut in range(1, len(whole)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole + b"\n" + whole[:cut])
        spool = Spool(path)
        spool.append({"kind": "text", "path": "a", "text": "b"})
        assert [record and record["kind"] for record in records(spool)] == ["metrics", None, "text"]
        assert History.read(spool).damaged_lines == 1
        spool.close()


def test_a_record_whose_newline_alone_was_lost_counts(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    path.write_text('{"kind":"tags","values":{"a":"1"}}')
    assert records(Spool(path)) == [{"kind": "tags", "values": {"a": "1"}}]


def test_foreign_lines_are_not_records(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    path.write_bytes(b'\x00\x00\n[1]\n"kind"\n{"other":1}\n\xff\n')
    assert records(Spool(path)) == [None] * 5


def test_a_full_disk_keeps_records_in_memory_and_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    written = [{"kind": "text", "path": str(i), "text": "x" * 100} for i in range(4)]
    spool.append(written[0])
    with file_size_limit(spool.size_bytes + 30):  # the second line is written in part
        spool.append(written[1])
        spool.append(written[2])
        assert spool.write_error is not None
        assert spool.waiting_bytes > 0
        assert records(spool) == written[:1]
    spool.append(written[3])
    assert spool.write_error is None
    assert spool.waiting_bytes == 0
    assert records(spool) == written


def test_long_records_cross_the_read_buffer(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    written = [{"kind": "text", "path": str(i), "text": "é" * 700_000} for i in range(3)]
    for record in written:
        spool.append(record)
    assert records(spool) == written


names = st.text(max_size=300) | st.text(alphabet=string.ascii_letters + "/._-: @é\n", min_size=1, max_size=20)


@given(names)
def test_mlflow_takes_every_cleaned_name(name: str) -> None:
    clean = clean_name(name)
    _validate_metric_name(clean)
    _validate_param_name(clean)
    _validate_tag_name(clean)
    assert 0 < len(clean) <= NAME_LENGTH


@given(names, names)
def test_two_names_stay_two(first: str, second: str) -> None:
    assert (clean_name(first) == clean_name(second)) == (first == second)


def test_good_names_are_left_alone() -> None:
    for name in ("loss", "evaluation/loss", "router usage: max", "optimizer.learning_rate", "größe"):
        assert clean_name(name) == name


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=40))
def test_history_knows_the_highest_step_of_each_metric(points: list[tuple[str, int]]) -> None:
    history = History()
    for key, step in points:
        history.apply({"kind": "metrics", "time": 1, "step": step, "values": {key: 0.5}})
    expected = {key: max(step for k, step in points if k == key) for key, _ in points}
    assert history.highest_step == expected

"""Lines are read many at a time, and nothing of that shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.documents import Document, ReadCounts
from data_prep.sources.files import FilesSettings, FilesSource

PLAIN = ['{"text": "a"}', '{"text": "é \\ud83d\\ude42", "id": 7}', '{"id": "x", "text": "two\\n"}', '{"text": ""}'] * 3
ODD = [
    *("", " ", "\x0b", '{"text": null}', '{"text": "\\ud83d"}', '{"text": "a", "text": "b"}', ' {"text": "c"}\t\r'),
    *(
        '{"text": "d", "n": 1e999, "m": NaN}',
        '{"text": "e", "id": "\\udead"}',
        '\ufeff{"text": "f"}',
        '{"text": "\udcff"}',
    ),
    *('{"text": "g", "n": ' + "1" * 5000 + "}", '{"text": "h", "n": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    *(
        '{"text": "i"},{"text": "j"}',
        '{"text": "k", "n": [1',
        "2]}",
        '{"text": "l"',
        '{"text": 1}',
        '{"title": 1}',
        "[1]",
    ),
    *('"text"', "1", "null", '{"text": "m\x01"}', '{"text": "n"} x', "\xa0", '{"text": "o"}\x0c'),
]


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([*PLAIN, *ODD])), st.sampled_from([None, "id"]), st.sampled_from(["\n", "\r\n", "\n\n"])
)
def test_lines_read_together_are_those_read_alone(tmp_path_factory, lines, id_column, newline):
    """Documents, counts, and the error that names a line: whatever stands around an odd or faulty one."""
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(newline.join([*lines, ""]).encode("utf-8", "surrogateescape"))
    source = FilesSource(FilesSettings({"train": [str(path)]}, id_column=id_column))

    def outcome() -> tuple[list[Document], ReadCounts, str]:
        documents, counts = [], ReadCounts()
        try:
            for task in source.tasks("train"):
                documents += task.documents(counts)
        except UserError as error:
            return documents, counts, str(error)
        return documents, counts, ""

    together = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.sources.json_lines._plain_documents", lambda *_: [][0])  # nothing is plain
        assert together == outcome()


def test_a_byte_order_mark_on_an_empty_line_is_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n')
    (task,) = FilesSource(FilesSettings({"train": [str(path)]})).tasks("train")
    assert [document.text for document in task.documents(ReadCounts())] == ["a"]

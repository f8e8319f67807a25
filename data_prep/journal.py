"""The diary of a preparation: one line per finished shard, from which a killed run goes on.

The journal lies in `DATASET/.prepare/journal.jsonl`. Its first line says what is being prepared; a rerun
with anything else is refused. A line counts once its newline is on disk; a torn last line is as if never
written, and its shard is simply made again, byte for byte.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.shards import explained_write_errors, sync_folder

WORK_FOLDER = ".prepare"


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard.

    `chunks` lists [token_start, document_start, data_offset] of each chunk; `next_position` and
    `next_offset` say where in the source the next shard begins, `totals` what was counted in the tasks
    before that one.
    """

    split: str
    shard: int
    bytes: int
    sha256: str
    ids_bytes: int
    ids_sha256: str
    chunks: list[list[int]]
    tokens_end: int
    documents_end: int
    next_position: list[int]
    next_offset: int
    totals: dict[str, Any]


class Journal:
    """Opens (and locks) the journal of a dataset folder.

    Args:
        folder: the dataset folder; made if missing.
        subject: what is being prepared, as JSON values.

    Raises UserError if another process prepares into the folder, if the folder holds an unfinished
    preparation of something else, or if it holds files that are no dataset.
    """

    def __init__(self, folder: Path, subject: dict[str, Any]) -> None:
        self.folder = folder
        self._work = folder / WORK_FOLDER
        with explained_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            strangers = sorted(p.name for p in folder.iterdir() if p.name != WORK_FOLDER)
            if strangers and not self._work.exists():
                raise UserError(
                    f"{folder}: the folder holds other files ({', '.join(strangers[:3])}"
                    f"{', …' if len(strangers) > 3 else ''}); choose a new or empty folder"
                )
            self._work.mkdir(exist_ok=True)
            self._lock = open(self._work / "lock", "w")  # noqa: SIM115  held until close()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"{folder}: another preparation is writing into this folder; wait for it, or choose another folder"
            ) from None
        self.entries: list[ShardEntry] = []
        self.finished_splits: dict[str, dict[str, Any]] = {}
        try:
            with explained_write_errors(self._work):
                self._open(subject)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, subject: dict[str, Any]) -> None:
        path = self._work / "journal.jsonl"
        whole_bytes = 0
        lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn
                lines.append(json.loads(line))
                whole_bytes += len(line) + 1
        if lines and lines[0] != subject:
            if len(lines) > 1:
                raise UserError(_differences(self.folder, lines[0], subject))
            lines, whole_bytes = [], 0  # nothing was published yet
        for record in lines[1:]:
            if "finished_split" in record:
                self.finished_splits[record["finished_split"]] = record["totals"]
            else:
                self.entries.append(ShardEntry(**record))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  held until close()
        self._file.truncate(whole_bytes)
        if not lines:
            self._append(subject)
            sync_folder(self._work)
            sync_folder(self.folder)

    def _append(self, value: dict[str, Any]) -> None:
        with explained_write_errors(self._work / "journal.jsonl"):
            content = json.dumps(value).encode() + b"\n"
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())

    def add(self, entry: ShardEntry) -> None:
        """Records a shard that was published."""
        self._append(asdict(entry))
        self.entries.append(entry)

    def finish_split(self, split: str, totals: dict[str, Any]) -> None:
        """Records that a split has no further shard."""
        self._append({"finished_split": split, "totals": totals})
        self.finished_splits[split] = totals

    def split_entries(self, split: str) -> list[ShardEntry]:
        return [entry for entry in self.entries if entry.split == split]

    def remove(self) -> None:
        """Deletes the journal: the manifest is in place."""
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Releases the folder to others."""
        self._file.close()
        self._lock.close()


def _differences(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [
        f"{folder}: holds an unfinished preparation with {key} = {_short(old.get(key))}, this one has "
        f"{_short(new.get(key))}; run it with the old settings, or choose another folder"
        for key in changed
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"

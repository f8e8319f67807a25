"""Finds the files that a pattern names: on a disk or behind a URL, each once, with a mark of its content."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from data_prep import remote
from data_prep.errors import UserError

Format = Literal["txt", "jsonl", "parquet"]
FORMATS: dict[str, Format] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".raw": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
GLOB = re.compile(r"[*?\[]")
LARGE_DOCUMENT_BYTES = 1 << 30  # a document is whole in memory: its text, its tokens, and copies of both


@dataclass(frozen=True)
class FoundFile:
    """One file.

    Attributes:
        url: an absolute path, or a URL.
        name: its path below the folder that all files of its split have in common: no matter where that lies.
        mark: changes with its content, as far as a file system or a server tells.
    """

    url: str
    name: str
    size: int
    mark: str
    format: Format
    compression: str | None

    @property
    def remote(self) -> bool:
        return "://" in self.url

    @property
    def shown(self) -> str:
        return remote.shown(self.url)

    def changed(self) -> bool:
        """Whether the file has changed since it was found."""
        try:
            now = remote.file_state(self.url) if self.remote else _local_state(self.url)
        except (OSError, UserError):
            return True
        return (now.num_bytes, now.mark) != (self.size, self.mark)


def find_files(paths: dict[str, list[str]]) -> tuple[dict[str, list[FoundFile]], list[str]]:
    """The files of each split, and lines to show about what was left out.

    A file that is named for a held-out split is left out of train.

    Raises UserError, with all problems at once, for a pattern that names nothing, a file that cannot be read or
    is of no known kind, and a file of two held-out splits.
    """
    problems: list[str] = []
    notes: list[str] = []
    if not paths:
        problems.append("no files named; give some with --path PATTERN")
    found: dict[str, dict[str, FoundFile]] = {}
    for split, patterns in paths.items():
        found[split] = {}
        for pattern in patterns:
            found[split].update((file.url, file) for file in _expand(pattern, problems, notes))
    for url in sorted(found.get("valid", {}).keys() & found.get("test", {}).keys()):
        problems.append(f"{remote.shown(url)}: named for valid and for test; a document belongs to one split: choose")
    train = found.get("train", {})
    for split in ("valid", "test"):
        for url in sorted(train.keys() & found.get(split, {}).keys()):
            del train[url]
            notes.append(f"{remote.shown(url)}: left out of train, as it is named for {split}")
            if not train:
                problems.append(f"no file is left for train: all are named for {split} too; name others")
    if problems:
        raise UserError(problems)
    return {split: _named(list(files.values())) for split, files in found.items()}, notes


def paths_by_split(paths: list[str]) -> dict[str, list[str]]:
    """Patterns by split: `valid=PATTERN` belongs to valid, `PATTERN` to train."""
    splits: dict[str, list[str]] = {}
    for path in paths:
        split, equals, pattern = path.partition("=")
        if equals and not os.path.lexists(path) and split in ("train", "valid", "test"):
            splits.setdefault(split, []).append(pattern)
        else:
            splits.setdefault("train", []).append(path)
    return splits


def _named(files: list[FoundFile]) -> list[FoundFile]:
    """The files in the order of their names, which no two share."""
    parts = {file.url: PurePosixPath(_path(file.url)).parts for file in files}
    shortest = min((len(part) for part in parts.values()), default=1) - 1
    common = 0
    while common < shortest and len({part[common] for part in parts.values()}) == 1:
        common += 1
    taken: set[str] = set()
    named = []
    for file in sorted(files, key=lambda file: (parts[file.url], file.url)):
        name = os.fsencode("/".join(parts[file.url][common:])).decode(errors="replace").lstrip("/")
        while name in taken:  # one path under two queries
            name += "~"
        taken.add(name)
        named.append(FoundFile(file.url, name, file.size, file.mark, file.format, file.compression))
    return named


def _path(url: str) -> str:
    """The path of a URL, without the query; its host is the first part."""
    return unquote(remote.shown(url).replace("://", ":/")) if url.startswith("http") else url.replace("://", ":/")


def _expand(pattern: str, problems: list[str], notes: list[str]) -> list[FoundFile]:
    pattern = pattern.removeprefix("file://")
    if not pattern or "\0" in pattern:
        problems.append(f"{pattern!r}: no path; give a file, a folder, a pattern or a URL")
        return []
    try:
        states, literal = _remote_files(pattern) if "://" in pattern else _local_files(pattern, problems)
    except FileNotFoundError:
        problems.append(f"{remote.shown(pattern)}: no such file")
        return []
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{remote.shown(pattern)}: cannot be read ({reason}); check the path and your access to it")
        return []
    except UserError as error:
        problems += [
            f"{remote.shown(pattern)}: no such file" if isinstance(error, remote.MissingError) else problem
            for problem in error.problems
        ]
        return []
    found, unknown = [], []
    for url, state in states.items():
        format, compression = format_of(url)
        if format is None:
            unknown.append(url)
        elif state.num_bytes is None:
            problems.append(
                f"{remote.shown(url)}: the server does not say how long it is; download it, and give the local path"
            )
        else:
            found.append(FoundFile(url, "", state.num_bytes, state.mark, format, compression))
    known = f"known endings: {', '.join(FORMATS)} (txt and jsonl also with {' or '.join(COMPRESSIONS)} after them)"
    if literal or (unknown and not found):
        problems += [f"{remote.shown(url)}: unknown kind of file; {known}" for url in unknown[:3]]
    elif unknown:
        notes.append(f"{remote.shown(pattern)}: {len(unknown):,} files of other kinds left out, such as {unknown[0]}")
    elif not states and not problems:
        problems.append(
            f"{remote.shown(pattern)}: matches no file; check the pattern (quote it against the shell; "
            "hidden files must be named)"
        )
    return found


def format_of(url: str) -> tuple[Format | None, str | None]:
    """Kind and compression, by the ending of the path; parquet compresses by itself."""
    path = _path(url).lower()
    compression = None
    for ending, name in COMPRESSIONS.items():
        if path.endswith(ending):
            path, compression = path.removesuffix(ending), name
    format = FORMATS.get(os.path.splitext(path)[1])
    return (None if format == "parquet" and compression else format), compression


# --- on a disk -------------------------------------------------------------------------------------------------


def _local_files(pattern: str, problems: list[str]) -> tuple[dict[str, remote.FileState], bool]:
    """Files by absolute path, and whether the pattern is the name of one file. A path that exists is meant as it is."""
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(path):
        names = list(_walk(path, problems, set()))
    elif os.path.lexists(path):
        state = _checked_state(path, problems)
        return {path: state} if state else {}, True
    elif GLOB.search(pattern):
        names = sorted(name for name in glob.iglob(path, recursive=True) if not os.path.isdir(name))
    else:
        raise FileNotFoundError(path)
    states = {name: _checked_state(name, problems) for name in names}
    return {name: state for name, state in states.items() if state}, False


def _walk(folder: str, problems: list[str], entered: set[tuple[int, int]]) -> Iterator[str]:
    """Files below a folder but for hidden ones; links are followed, though never in a circle."""
    state = os.stat(folder)
    if (state.st_dev, state.st_ino) in entered:
        return
    entered.add((state.st_dev, state.st_ino))
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror}); check your access to it")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _walk(path, problems, entered)
        else:
            yield path


def _checked_state(path: str, problems: list[str]) -> remote.FileState | None:
    """None, with a problem, for a link to nowhere and for what is no file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            problems.append(f"{path}: a device or pipe, not a file; write what it gives into a file first")
            return None
        return _local_state(path)
    except FileNotFoundError:
        problems.append(f"{path}: a link to {os.readlink(path)}, which is not there; restore that, or remove the link")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); check your access to it")
    return None


def _local_state(path: str) -> remote.FileState:
    state = os.stat(path)
    return remote.FileState(state.st_size, f"{state.st_mtime_ns} {state.st_ino}")


# --- behind a URL ------------------------------------------------------------------------------------------------


def _remote_files(pattern: str) -> tuple[dict[str, remote.FileState], bool]:
    """Files by URL, as `_local_files` gives them, where a storage client lists them.

    Of a web server only whole URLs and `*` are known.
    """
    if pattern.startswith("http"):
        if "*" not in urlsplit(pattern).path:
            return {pattern: remote.file_state(pattern)}, True
        system, path = remote.storage(pattern)
        urls = remote.retried(pattern, lambda: [url for url in system.glob(path) if not url.endswith("/")])
        return {url: remote.file_state(url) for url in sorted(urls)}, False
    system, path = remote.storage(pattern)

    def listing() -> tuple[dict[str, Any], bool]:
        system.invalidate_cache()
        if system.isfile(path):
            return {path: system.info(path)}, True
        if GLOB.search(path):
            return system.glob(path, detail=True), False
        return system.find(path, detail=True), False

    entries, literal = remote.retried(pattern, listing)
    if not entries and not GLOB.search(path):
        raise FileNotFoundError(pattern)
    root = _fixed_part(path)
    return {
        system.unstrip_protocol(name): remote.state_of(entry)
        for name, entry in sorted(entries.items())
        if entry.get("type") != "directory" and (literal or not _hidden(name.removeprefix(root)))
    }, literal


def _fixed_part(path: str) -> str:
    """The folders before the first wildcard."""
    mark = GLOB.search(path)
    return path[: path.rfind("/", 0, mark.start()) + 1] if mark else path


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def large_documents(files: dict[str, list[FoundFile]]) -> list[str]:
    """A note for each file that is one document and will want much memory."""
    return [
        f"{file.shown}: one document of {file.size / 1e9:.1f} GB, which takes up to {9 * file.size / 1e9:.0f} GB of "
        "memory; --separator blank-lines makes a document of each run of lines between blank ones"
        for split in files.values()
        for file in split
        if file.format == "txt" and file.size > LARGE_DOCUMENT_BYTES
    ]

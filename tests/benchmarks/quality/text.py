"""The dataset of the comparison: articles of `../shared/data/enwiki2019`, prepared as a user prepares text.

Split `train` is twelve files of articles, `valid` the held-out file, `test` WikiText-103's test split, one
document, so that its word perplexity has the denominators of the literature.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from data_prep.errors import UserError
from data_prep.manifest import Dataset, open_dataset
from tests.conftest import REAL_TEXT, ROOT

CACHE = ROOT / ".cache" / "quality"
VOCAB_SIZE = 8192
TOKENIZER_BYTES = 12_000_000


def dataset() -> Dataset:
    """Prepared at the first call, opened afterwards."""
    folder = CACHE / "dataset"
    if not (folder / "manifest.json").exists():
        _prepare(folder)
    return open_dataset(folder)


def _prepare(folder: Path) -> None:
    if not REAL_TEXT.is_dir():
        raise UserError(f"no text at {REAL_TEXT}; put the folder `shared/data` beside the project")
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        with open(CACHE / f"{name}.jsonl", "w", encoding="utf-8") as lines:
            for path in sorted((REAL_TEXT / "enwiki2019").glob(f"{name}*.txt")):
                for article in re.split(r"(?m)^(?== [^=].* =$)", path.read_text(encoding="utf-8")):
                    if article.strip():
                        lines.write(json.dumps({"text": article}, ensure_ascii=False) + "\n")
    paths = [f"train={CACHE / 'train.jsonl'}", f"valid={CACHE / 'valid.jsonl'}"]
    paths.append(f"test={REAL_TEXT / 'wikitext' / 'wiki.test.raw'}")
    source = ["--source", "files", *(word for path in paths for word in ("--path", path))]
    tokenizer = CACHE / "tokenizer"
    limits = ["--vocab-size", VOCAB_SIZE, "--training-bytes", TOKENIZER_BYTES]
    _globallocal("tokenizer", *source, *limits, "--output", tokenizer)
    _globallocal("prepare", *source, "--tokenizer", tokenizer, "--output", folder)


def _globallocal(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "launch", *map(str, arguments)], check=True, cwd=ROOT, stdout=sys.stderr)

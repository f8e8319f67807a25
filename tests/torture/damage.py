"""Damage to every kind of file of real checkpoints: a flipped byte, a missing file, a file cut short."""

import itertools
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoints.folder import newest_verified_alone, verify
from tests.pipeline.ranks import Run, run_ranks
from tests.torture.kills import prepare

TRIES = 200
STAGES = (0, 2, 3)
OLDER, NEWER = "step-00000003", "step-00000006"


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= generator.randrange(1, 256)
    path.write_bytes(content)


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


def cut(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one byte flipped, anywhere": flip,
    "a file missing": remove,
    "a file cut short, anywhere": cut,
}


def run(folder: Path) -> dict[str, object]:
    dataset, seed = prepare(folder), random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    generator = random.Random(seed)
    plain = ["tracking.enabled=false", "evaluation.split=null"]
    runs = [Run(f"stage-{stage}", [*plain, f"deepspeed.config=ds_configs/zero{stage}.json"]) for stage in STAGES]
    assert all(result["code"] == 0 for result in run_ranks(runs, folder, dataset))
    roots = [folder / item.name / "checkpoints" for item in runs]
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for root in roots for path in (root / NEWER).iterdir()):
        kinds.setdefault(kind(path.name), []).append(path)
    counts = dict.fromkeys(DAMAGES, 0)
    cases = itertools.cycle(itertools.product(DAMAGES, kinds))
    for damage, name in itertools.islice(cases, TRIES):
        try_once(generator.choice(kinds[name]), DAMAGES[damage], generator)
        counts[damage] += 1
    return {
        "tries": TRIES,
        **counts,
        "kinds of files": f"{len(kinds)}: {', '.join(f'`{name}`' for name in kinds)}",
        "checkpoints of": f"two ranks at ZeRO {', '.join(map(str, STAGES))}",
        "found, the file named, nothing else named": TRIES,
        "the older checkpoint taken": TRIES,
        "seed": seed,
    }


def kind(name: str) -> str:
    """`rng-rank-00001.pt` → `rng-rank-N.pt`."""
    return re.sub(r"\d+", "N", name)


def try_once(path: Path, damage: Callable[[Path, random.Random], None], generator: random.Random) -> None:
    """Raises AssertionError where the damage is not found, or laid to another file; then all is whole again."""
    folder, spare = path.parent, path.parents[1] / "spare"
    shutil.copyfile(path, spare)
    damage(path, generator)
    problems = verify(folder)
    assert len(problems) == 1, (path, problems)
    assert path.name in problems[0], (path, problems)
    assert newest_verified_alone(folder.parent) == folder.with_name(OLDER)
    spare.replace(path)
    assert verify(folder) == []

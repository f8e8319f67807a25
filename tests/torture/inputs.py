"""Hostile inputs: each `inputs_*.py` here holds a part of the tour, and its rule."""

import importlib
from pathlib import Path


def run(folder: Path) -> dict[str, object]:
    figures: dict[str, object] = {}
    for part in sorted(Path(__file__).parent.glob("inputs_*.py")):
        place = folder / part.stem
        place.mkdir()
        figures |= importlib.import_module(f"tests.torture.{part.stem}").run(place)
    return figures

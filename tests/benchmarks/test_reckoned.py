"""The table of what a pass moves and multiplies leaves nothing out, and is the one on the page."""

import pytest
import torch

from model.modeling_globallocal import GlobalLocalForCausalLM
from tests.benchmarks.reckoned import CONFIG, MICRO_BATCH, Part, Reckoned, counted, reckon, table
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def reckoned() -> list[tuple[Part, Reckoned]]:
    return reckon()


def test_the_parts_are_the_whole_pass(reckoned: list[tuple[Part, Reckoned]]) -> None:
    """Of the model itself, written out: all its operations, and its bytes but for what happens once per pass."""

    def a_pass() -> list:
        model = GlobalLocalForCausalLM(CONFIG).bfloat16().train()
        ids = torch.zeros(MICRO_BATCH, dtype=torch.long)
        return [lambda: torch.autograd.grad(model(ids, shift_labels=ids).loss, list(model.parameters()))]

    moved, flops = counted(a_pass)
    assert sum(part.times * one.plain_flops for part, one in reckoned) == pytest.approx(flops, rel=0.01)
    assert sum(part.times * one.plain_bytes for part, one in reckoned) == pytest.approx(moved, rel=0.05)


def test_kernels_move_less(reckoned: list[tuple[Part, Reckoned]]) -> None:
    assert all(one.bytes < one.plain_bytes for part, one in reckoned if part.bytes is not None)


def test_the_page_has_the_table(reckoned: list[tuple[Part, Reckoned]]) -> None:
    """`python -m tests.benchmarks.reckoned` prints it anew."""
    assert "\n".join(table(reckoned)) in (ROOT / "docs" / "model.md").read_text()

"""A checkpoint of many ranks in one file that any number of ranks, and plain torch, can read."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.checkpoints import zero_layout
from pipeline.checkpoints.folder import read_state, verify
from pipeline.checkpoints.reshard import ParameterReader
from pipeline.checkpoints.write import commit, write_files
from pipeline.engine.internals import Piece
from pipeline.files import locked

MODEL_FILE = "mp_rank_00_model_states.pt"
LINE_SECONDS = 10


def consolidate(folder: Path, output: Path, say: Callable[[str], None]) -> Path:
    """Write `output/step-XXXXXXXX` from a checkpoint; it appears whole or not at all, and one job writes it.

    One that stands there and verifies is left as it is; a damaged one is made anew. Takes 12 bytes of memory and of
    disk a parameter.

    Returns:
        The new checkpoint.

    Raises:
        UserError: `folder` does not verify, has no layouts, or the disk is in the way.
    """
    final = output / folder.name
    with _alone(output, say):
        if final.exists():
            damage = verify(final)
            if not damage:
                say(f"{final}: stands already, and verifies")
                return final
            say(f"{final}: is damaged, and made anew: {damage[0]}")
        if problems := verify(folder):
            raise UserError(problems)
        state = read_state(folder)
        building = output / f".resharding-{folder.name}"
        shutil.rmtree(building, ignore_errors=True)  # of a job that was killed
        try:
            written, problems = write_files(building, _contents(ParameterReader(folder, state), say))
            sums = [[sum(column) for column in zip(*state.loss_sums, strict=True)]] if state.loss_sums else []
            one = state.model_copy(update={"world_size": 0, "zero_stage": 0, "loss_sums": sums})
            problems = problems or commit(building, final, one, written)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if problems:
            raise UserError(problems)
    return final


def _contents(reader: ParameterReader, say: Callable[[str], None]) -> dict[str, Any]:
    """File name → what is in it: the form of a checkpoint of stage 0, with fp32 weights."""
    module: dict[str, torch.Tensor] = dict(reader.buffers)
    states: dict[int, dict[str, Any]] = {}
    pieces = []
    said = time.monotonic()
    for index, (name, elements) in enumerate(reader.elements.items()):
        shape = reader.shapes[name]
        module[name] = reader.read(name, 0, elements).view(shape)
        states[index] = {kind: reader.read(name, 0, elements, kind).view(shape) for kind in reader.moments(name)}
        states[index]["step"] = torch.tensor(reader.optimizer_step)
        pieces.append(Piece(name, 0, index, 0, elements))
        if time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            say(f"read {index + 1:,} of {len(reader.elements):,} parameters")
    if "lm_head.weight" not in module and (tied := module.get("model.embed_tokens.weight")) is not None:
        module["lm_head.weight"] = tied  # one matrix under both names, as DeepSpeed and transformers write it
    optimizer = {**reader.loss_scale, "state": states}
    model = {"module": module, "buffer_names": list(reader.buffers), "optimizer": optimizer, **reader.counters}
    return {MODEL_FILE: model, zero_layout.file_name(0): zero_layout.to_plain(pieces)}


@contextmanager
def _alone(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `output` while inside; wait where another job holds it. The lock dies with its holder."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / ".lock", wait=False) as held:
            if held is not None:
                yield
                return
        say(f"{output}: another job is writing there; waiting for it")
        with locked(output / ".lock"):
            yield
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}") from None

"""A checkpoint of any number of ranks, ZeRO stage and precision into an engine of any other.

Nothing is converted and nothing is written: each rank maps the checkpoint's files into memory and copies out of them
the elements that its own optimizer holds. docs/reliability.md says why this is not DeepSpeed's universal format.
"""

from collections import defaultdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.checkpoints import zero_layout
from pipeline.checkpoints.folder import CheckpointState
from pipeline.engine.internals import (
    MOMENTS,
    Engine,
    Piece,
    begin_filling,
    flat_tensors,
    moments_of,
    pieces_of,
    refresh_weights,
    safe_globals,
    set_loss_scale,
)
from pipeline.redact import failure_message

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class ParameterReader:
    """A verified checkpoint, read by parameter.

    Attributes:
        elements: parameter name → number of elements.
        shapes: parameter name → shape.
        buffers: persistent buffers by name.
        optimizer_step: updates that each parameter has had; fp16's skipped steps are not among them.
        loss_scale: fp16's dynamic loss scale and its history; empty where there is none.
        counters: what DeepSpeed's engine counts.

    Raises:
        UserError: it holds no layouts, or its files do not hold what they say.
    """

    def __init__(self, folder: Path, state: CheckpointState) -> None:
        self.folder = folder
        ranks = range(state.world_size if state.zero_stage else 1)  # at stage 0 all ranks hold the same
        self._pieces: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
        self.elements: dict[str, int] = defaultdict(int)
        for rank in ranks:
            for piece in zero_layout.read(folder, rank):
                self._pieces[piece.parameter].append((rank, piece))
                self.elements[piece.parameter] += piece.elements
        pattern = "zero_pp_rank_0_mp_rank_00_model_states.pt" if state.zero_stage == 3 else "mp_rank_00_model_states.pt"
        self._model = _open(folder / pattern)
        self._module = self._model["module"]
        grouped = self._model.get("param_shapes")  # absent at stage 0, which holds the parameters whole
        self.shapes: dict[str, tuple[int, ...]] = (
            {name: tuple(shape) for group in grouped for name, shape in group.items()}
            if grouped
            else {name: tuple(self._module[name].shape) for name in self.elements}
        )
        self.buffers = {name: self._module[name] for name in self._model["buffer_names"]}
        if state.zero_stage:
            prefix = "bf16_" if state.precision == "bf16" else ""
            files = [_open(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in ranks]
            held = [file["optimizer_state_dict"] for file in files]
        else:
            held = [self._model["optimizer"]]
        self._flats = [_flats(item) for item in held]
        self._states = [_states(item) for item in held]
        steps = {float(flat["step"]) for states in self._states for flat in states.values()}
        if len(steps) > 1 or (state.step and not steps):
            raise UserError(f"{folder}: optimizer steps {sorted(steps)} stand where one belongs")
        for pieces in self._pieces.values():
            for rank, piece in pieces:
                flat = self._flat(rank, piece, "fp32")
                if flat is None or flat.numel() < piece.flat_start + piece.elements:
                    raise UserError(
                        f"{folder}: rank {rank}'s optimizer states lack part of the weights, and cannot be resharded; "
                        "resume it with its own number of ranks and DeepSpeed JSON"
                    )
        self.optimizer_step = steps.pop() if steps else 0.0
        self.loss_scale = read_loss_scale(held[0])
        self.counters: dict[str, int] = {name: self._model[name] for name in COUNTERS}

    def read(self, parameter: str, start: int, elements: int, kind: str = "fp32") -> torch.Tensor:
        """Part of a flattened parameter ("fp32") or of a moment ("exp_avg", "exp_avg_sq"): fp32 [elements]."""
        if parameter not in self._pieces:
            raise UserError(f"{self.folder}: holds no {parameter}; it is of another model")
        result = torch.zeros(elements)
        for rank, piece in self._pieces[parameter]:
            low = max(start, piece.parameter_start)
            high = min(start + elements, piece.parameter_start + piece.elements)
            flat = self._flat(rank, piece, kind) if low < high else None
            if flat is not None:
                inside = piece.flat_start + low - piece.parameter_start
                result[low - start : high - start] = flat.view(-1)[inside : inside + high - low]
        return result

    def moments(self, parameter: str) -> list[str]:
        """Which moments of a parameter are held: Muon has one, AdamW two, and neither has any before its first step."""
        states = [self._states[rank].get(piece.flat, {}) for rank, piece in self._pieces[parameter]]
        return [kind for kind in MOMENTS if any(kind in state for state in states)]

    def _flat(self, rank: int, piece: Piece, kind: str) -> torch.Tensor | None:
        """None: the moment of a parameter that has had no gradient yet, which counts as zero."""
        if kind != "fp32":
            return self._states[rank].get(piece.flat, {}).get(kind)
        flats = self._flats[rank]
        weights: torch.Tensor = flats[piece.flat] if flats else self._module[piece.parameter]
        return weights


def read_loss_scale(held: dict[str, Any]) -> dict[str, Any]:
    """fp16's dynamic loss scale and its history in an optimizer's saved state; empty where there is none."""
    scaler = held.get("loss_scaler", held)  # an object from stage 1 on, plain values at stage 0
    values = scaler if isinstance(scaler, dict) else vars(scaler)
    return {name: values[name] for name in SCALER if name in values} if "last_overflow_iter" in values else {}


def _open(path: Path) -> Any:
    """Its tensors stay on the disk until they are read."""
    try:
        with torch.serialization.safe_globals(safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{path}: {failure_message(error)}") from None


def _flats(held: dict[str, Any]) -> list[torch.Tensor]:
    """The fp32 tensors in an optimizer's state; empty at stage 0 in fp32, where the weights themselves are those."""
    for name in ("fp32_flat_groups", "single_partition_of_fp32_groups"):  # stage 3; stages 1 and 2
        if name in held:
            return list(held[name])
    return [tensor for group in held.get("fp32_groups", []) for tensor in group]


def _states(held: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Index of the flat tensor → step and moments."""
    inner = held.get("base_optimizer_state") or held.get("optimizer_state_dict") or held
    states: dict[int, dict[str, Any]] = inner["state"]
    return states


@torch.no_grad()
def fill(model: torch.nn.Module, reader: ParameterReader) -> None:
    """fp32 weights and buffers into a model in memory, without DeepSpeed's engine."""
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.read(name, 0, parameter.numel()).view_as(parameter))
    _fill_buffers(model, reader)


def _fill_buffers(model: torch.nn.Module, reader: ParameterReader) -> None:
    for name, buffer in model.named_buffers():
        if name in reader.buffers:
            buffer.copy_(reader.buffers[name])


@torch.no_grad()
def restore(engine: Engine, reader: ParameterReader) -> None:
    """Weights, moments, step counts, buffers, loss scale and counters of a checkpoint into an engine that fits.

    Learning rate, weight decay and betas stay those of the engine's own groups. All ranks call this.
    """
    begin_filling(engine)
    flats, pieces = flat_tensors(engine), pieces_of(engine)
    states = [moments_of(engine, flat, reader.optimizer_step) for flat in flats]
    for piece in pieces:
        for kind, flat in (("fp32", flats[piece.flat]), *states[piece.flat].items()):
            target = flat.view(-1)[piece.flat_start : piece.flat_start + piece.elements]
            if reader.optimizer_step or kind == "fp32":
                target.copy_(reader.read(piece.parameter, piece.parameter_start, piece.elements, kind))
    refresh_weights(engine, flats, pieces)
    _fill_buffers(engine.module, reader)
    set_loss_scale(engine.optimizer, reader.loss_scale)
    for name, value in reader.counters.items():
        setattr(engine, name, value)


def check(engine: Engine, reader: ParameterReader) -> None:
    """Raises UserError where the checkpoint is not of this model, or the engine's states are out of reach."""
    flat_tensors(engine)
    here = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    problems = [
        f"{reader.folder}: holds {reader.elements.get(name, 0):,} elements of {name}, the model {here.get(name, 0):,}"
        for name in sorted(here.keys() | reader.elements.keys())
        if here.get(name) != reader.elements.get(name)
    ]
    if problems:
        raise UserError(problems)

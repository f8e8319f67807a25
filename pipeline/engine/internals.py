"""The only file that touches what DeepSpeed keeps to itself: names with an underscore, and the parts of its optimizers.

Written for DeepSpeed 0.19. `PRIVATE_NAMES` lists what is used; a test says which of them an update has taken away.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from pipeline.engine.muon import Muon, Part
from pipeline.random_state import random_state, set_random_state

PRIVATE_NAMES = {
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        *("_get_optimizer_loss_scale", "_copy_recovery_script", "_global_grad_norm", "_step_applied"),
        *("clip_fp32_gradients", "global_steps", "global_samples", "skipped_steps", "micro_steps"),
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        *("fp32_partitioned_groups_flat", "grad_position", "get_param_id", "_get_param_partition_rank"),
        *("checkpoint_event_prologue", "checkpoint_event_epilogue", "overflow", "_global_grad_norm"),
        *("has_overflow_partitioned_grads_serial", "averaged_gradients"),
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        *("single_partition_of_fp32_groups", "update_lp_params", "overflow", "_global_grad_norm"),
        *("check_overflow", "get_grad_norm_direct", "scaled_global_norm"),
    ),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": ("fp32_groups_flat_partition", "update_lp_params"),
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups", "overflow"),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": (
        *("raise_error_at_min_scale", "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"),
    ),
    "deepspeed.runtime.config.DeepSpeedConfig": ("_configure_train_batch_size", "global_rank", "world_size"),
}
"""Class → what is used of it and is no part of DeepSpeed's documented interface."""

MOMENTS = ("exp_avg", "exp_avg_sq")
ENGINE_COUNTERS = (
    *("global_steps", "global_samples", "skipped_steps", "micro_steps"),
    *("_global_grad_norm", "_step_applied"),
)
OPTIMIZER_COUNTERS = ("overflow", "_global_grad_norm")


class Engine(Protocol):
    """What the project uses of DeepSpeed's engine."""

    module: torch.nn.Module
    optimizer: Any
    checkpoint_engine: Any
    training: bool
    micro_steps: int

    @property
    def device(self) -> torch.device: ...
    def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool = True) -> Any: ...
    def step(self) -> None: ...
    def train_batch_size(self) -> int: ...
    def set_train_batch_size(self, train_batch_size: int) -> None: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def zero_grad(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> Any: ...
    def gradient_clipping(self) -> float: ...
    def fp16_enabled(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> Any: ...
    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, Any]: ...


# ---- the step


def loss_scale(engine: Any) -> float:
    """The factor of fp16's losses and gradients; 1 in other precisions."""
    return float(engine._get_optimizer_loss_scale()) if engine.fp16_enabled() else 1.0


def clip_by_the_norm_that_is_checked(engine: Any) -> None:
    """Replace the clipping of stage 0 in fp32: DeepSpeed's own forgets the norm and would take a step with NaN."""

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
        engine._global_grad_norm = norm = norm.cpu()
        engine.optimizer.overflow = not bool(torch.isfinite(norm))  # what its other optimizers tell the engine
        if engine.optimizer.overflow:
            engine.zero_grad()  # AdamW moves nothing that has no gradient

    engine.clip_fp32_gradients = clip


def wait_once_a_step(engine: Any) -> None:
    """ZeRO 1 and 2 ask the device whether gradients are finite, then for each group how long they are, and for each
    whether that was a number: each time the host waits, and nothing is launched meanwhile. Here it waits once.

    The norm of gradients that are not finite is not finite itself, which DeepSpeed looks at before it moves anything,
    and on the host it costs no further wait. The sums are DeepSpeed's, bit for bit.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return
    if optimizer.cpu_offload:
        return
    of_all_groups = optimizer.scaled_global_norm

    def norm_of_group(gradients: list[torch.Tensor], params: Any) -> torch.Tensor:
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        own = own[: len(params)]
        squares = torch.zeros((), dtype=torch.float32, device=engine.device)
        if own:
            norms = torch._foreach_norm(own, 2.0, dtype=torch.float64)
            squares = torch.stack(norms).square().sum().float()
        dist.all_reduce(squares, group=optimizer.dp_process_group)
        return squares.sqrt()

    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = norm_of_group
    optimizer.scaled_global_norm = lambda norm_type=2: of_all_groups(norm_type).cpu()


def look_at_all_gradients_at_once(engine: Any) -> None:
    """One kernel asks whether all gradients are finite, where ZeRO 3 on a GPU launches seven for each of them.

    It is the one of torch's own gradient scaler; gradients times 1 keep their bits.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3 or engine.device.type != "cuda":
        return

    def not_finite() -> torch.Tensor:
        gradients = [g for group in optimizer.averaged_gradients.values() for g in group or () if g is not None]
        found = torch.zeros(1, device=engine.device)
        one = torch.ones(1, device=engine.device)
        for dtype in {gradient.dtype for gradient in gradients}:
            same = [gradient for gradient in gradients if gradient.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)
        return found.bool()

    optimizer.has_overflow_partitioned_grads_serial = not_finite


def let_the_loss_scale_fall(engine: Any) -> None:
    """No error of DeepSpeed's at the smallest loss scale: the guard bounds overflows, and says why."""
    if hasattr(getattr(engine.optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False


def take_global_batches_of(engine: Engine, samples: int) -> None:
    """From here on a step is as many micro-batches as `samples` need; only between two steps.

    DeepSpeed takes a step where its count of micro-batches is a multiple of a step's: the count begins anew.
    """
    if engine.train_batch_size() != samples:
        engine.set_train_batch_size(samples)
        engine.micro_steps = 0


class StepState:
    """What a dropped step moves besides the weights; no collective."""

    def __init__(self, engine: Any) -> None:
        self.holders = [(engine, ENGINE_COUNTERS), (engine.optimizer, OPTIMIZER_COUNTERS)]
        self.attributes = [
            {name: vars(item)[name] for name in names if name in vars(item)} for item, names in self.holders
        ]
        optimizer = engine.optimizer
        self.scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        self.scaling = dict(vars(self.scaler)) if self.scaler else {}
        self.random = random_state()

    def restore(self) -> None:
        for (item, _), values in zip(self.holders, self.attributes, strict=True):
            vars(item).update(values)
        if self.scaler:
            vars(self.scaler).update(self.scaling)
        set_random_state(self.random)


# ---- the optimizer's tensors


class Piece(NamedTuple):
    """`elements` of a flattened parameter, from `parameter_start` on; in flat tensor `flat` from `flat_start` on."""

    parameter: str
    parameter_start: int
    flat: int
    flat_start: int
    elements: int


def flat_tensors(engine: Engine) -> list[torch.Tensor]:
    """The fp32 tensors that this rank's optimizer updates, in the order of its groups."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    groups = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [tensor for group in groups for tensor in group]  # stage 0: a tensor a parameter


def pieces_of(engine: Engine) -> list[Piece]:
    """Every piece that this rank's optimizer holds."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if stage == 0:
        groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        return [Piece(names[item], 0, index, 0, item.numel()) for index, item in enumerate(parameters)]
    pieces = _pieces_of_stage_3(optimizer, names) if stage == 3 else _pieces_of_stages_1_and_2(names)
    return [piece for piece in pieces if piece.elements > 0]


def _pieces_of_stages_1_and_2(names: dict[torch.nn.Parameter, str]) -> Iterator[Piece]:
    for parameter, name in names.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, inside.start, mapping.param_group_index, flat.start, inside.numel)


def _pieces_of_stage_3(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[Piece]:
    for parameter, name in names.items():
        flat, flat_start, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * partition  # the last partition is padded
        yield Piece(name, start, flat, flat_start, min(partition, parameter.ds_numel - start))  # type: ignore[attr-defined]


def moments_of(engine: Engine, flat: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
    """The optimizer's state of one flat tensor, made where it is not there yet, with a step tensor of its own."""
    base = _torch_optimizer(engine)
    state: dict[str, Any] = base.state[flat]
    kinds = MOMENTS[:1] if isinstance(base, Muon) and base.has_one_moment(flat) else MOMENTS
    if isinstance(base, torch.optim.AdamW):
        fused = base.defaults.get("fused")
        state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device if fused else "cpu")
    else:  # DeepSpeedCPUAdam counts in an int
        state["step"] = int(step)
    for name in kinds:
        state.setdefault(name, torch.zeros_like(flat)).zero_()
    return {name: state[name] for name in kinds}


def load_weights_and_moments(engine: Engine, folder: str, tag: str) -> bool:
    """DeepSpeed's own loading, which also puts the saved decay, betas and the like in place of the run's: undone here.

    Returns:
        Whether there was something to load. The learning rate is the schedule's.
    """
    own = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in _groups(engine)]
    hook = _torch_optimizer(engine).register_load_state_dict_pre_hook(_copy_of_moments)
    try:
        path, _ = engine.load_checkpoint(folder, tag=tag)
    finally:
        hook.remove()
    for group, settings in zip(_groups(engine), own, strict=True):
        group.update(settings)
    return bool(path)


def _copy_of_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """An optimizer on a CPU keeps the very tensors that it is given: these lie in a checkpoint's file, mapped."""
    moments = {
        key: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for key, state in saved["state"].items()
    }
    return {**saved, "state": moments}


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The one that moves the weights: DeepSpeed's wraps it, or is it."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _groups(engine: Engine) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    return groups


def parts_of(engine: Engine, shapes: dict[str, tuple[int, ...]]) -> dict[torch.Tensor, list[Part]]:
    """Where the parameters that `shapes` names lie in this rank's flat tensors; all ranks call it.

    A parameter of which this rank holds nothing is named too: so every rank has the same ones in the same order.
    """
    own = {(piece.flat, piece.parameter): piece for piece in pieces_of(engine) if piece.parameter in shapes}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, list(own))
    flats = flat_tensors(engine)
    parts: dict[torch.Tensor, list[Part]] = {}
    for flat, name in sorted({place for places in by_rank for place in places}):
        piece = own.get((flat, name), Piece(name, 0, flat, 0, 0))
        part = Part(shapes[name], piece.parameter_start, piece.flat_start, piece.elements)
        parts.setdefault(flats[flat], []).append(part)
    return parts


def let_zero_take(kind: type[torch.optim.Optimizer]) -> None:
    """DeepSpeed has a list of the optimizers whose tensors it cuts up, and calls others untested."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def begin_filling(engine: Any) -> None:
    """Before `flat_tensors` are filled; `refresh_weights` ends it."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


def refresh_weights(engine: Engine, flats: list[torch.Tensor], pieces: list[Piece]) -> None:
    """The weights that the forward pass reads, from the fp32 ones that the optimizer updates."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    parameters = dict(engine.module.named_parameters())
    if stage == 3:
        for piece in pieces:
            source = flats[piece.flat].view(-1)[piece.flat_start : piece.flat_start + piece.elements]
            parameters[piece.parameter].ds_tensor.view(-1)[: piece.elements].copy_(source)  # type: ignore[attr-defined]
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    else:
        for piece, flat in zip(pieces, flats, strict=True):
            parameter = parameters[piece.parameter]
            if parameter is not flat:
                parameter.copy_(flat)


def set_loss_scale(optimizer: Any, values: dict[str, Any]) -> None:
    """Go on with a saved dynamic loss scale, where the optimizer has one."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    if values and getattr(scaler, "last_overflow_iter", None) is not None:
        for name in values.keys() & vars(scaler).keys():
            setattr(scaler, name, values[name])


# ---- checkpoints and settings


def leave_out_the_recovery_script(engine: Any) -> None:
    """A script of DeepSpeed's would be copied into the checkpoint, past the checkpoint engine."""
    engine._copy_recovery_script = lambda folder: None


def safe_globals() -> list[Any]:
    """The classes, besides tensors, that DeepSpeed's own files hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, fragment_address]


def parse_settings(settings: dict[str, Any], rank: int, world_size: int) -> Any:
    """DeepSpeed's own reading of its settings, as that rank of a job of that size would read them.

    Raises:
        AssertionError, ValueError: it refuses them.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    class RankSettings(DeepSpeedConfig):  # type: ignore[misc]
        def _configure_train_batch_size(self) -> None:
            self.world_size, self.global_rank = world_size, rank
            super()._configure_train_batch_size()

    return RankSettings(settings)

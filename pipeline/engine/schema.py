"""The knobs of a DeepSpeed JSON that this project trains with: their names, kinds and ranges.

DeepSpeed passes over a misspelt key outside `zero_optimization`, and takes "no" for true. For `zero_optimization` its
own schema is used, read strictly.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from pipeline.settings.section import MOST, Section, other_kind, plain, short

DType = Literal["fp32", "fp16", "bf16"]
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
LARGEST_BUCKET = 2**31 - 1
"""Elements."""


class Bf16(Section):
    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16(Section):
    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(0, ge=0, le=2**32)
    initial_scale_power: int = Field(16, ge=0, le=32)
    loss_scale_window: int = Field(1000, ge=1, le=MOST)
    hysteresis: int = Field(2, ge=1, le=MOST)
    consecutive_hysteresis: bool = False
    min_loss_scale: int = Field(1, ge=1, le=2**32)
    fp16_master_weights_and_grads: bool = False


class ActivationCheckpointing(Section):
    partition_activations: bool = False
    contiguous_memory_optimization: bool = False
    cpu_checkpointing: bool = False
    number_checkpoints: int | None = Field(None, ge=1, le=MOST)
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


class FlopsProfiler(Section):
    enabled: bool = False
    recompute_fwd_factor: float = Field(0, ge=0, le=10)
    profile_step: int = Field(1, ge=1, le=MOST)
    module_depth: int = Field(-1, ge=-1, le=1000)
    top_modules: int = Field(1, ge=1, le=1000)
    detailed: bool = True
    output_file: str | None = Field(None, min_length=1, max_length=4096)


class CommsLogger(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    verbose: bool = False
    debug: bool = False


class Compile(Section):
    deepcompile: bool = False


class Aio(Section):
    block_size: int = Field(2**20, ge=1, le=2**31 - 1)
    queue_depth: int = Field(8, ge=1, le=2**20)
    intra_op_parallelism: int = Field(1, ge=1, le=1024)
    single_submit: bool = False
    overlap_events: bool = True


class Checkpoint(Section):
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"


class DataTypes(Section):
    grad_accum_dtype: DType | None = None
    buffer_dtype: DType | None = None


class Throughput(Section):
    enabled: bool = True
    synchronized: bool = True


class Timers(Section):
    throughput: Throughput = Throughput()


class Knobs(Section):
    """The top level, without what the run file owns and without `zero_optimization`."""

    communication_data_type: DType | None = None
    seq_parallel_communication_data_type: DType | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1, gt=0, le=1e6)
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    disable_allgather: bool = False
    steps_per_print: int = Field(2**31, ge=1, le=MOST)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    bf16: Bf16 = Bf16()
    fp16: Fp16 = Fp16()
    data_types: DataTypes = DataTypes()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    comms_logger: CommsLogger = CommsLogger()
    compile: Compile = Compile()
    aio: Aio = Aio()
    checkpoint: Checkpoint = Checkpoint()
    timers: Timers = Timers()


MANY = 40
"""More names than a line should hold."""
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""What the run file decides; the JSON may repeat it."""
NOT_OURS = {
    "leaf_module": "is for mixtures of experts, and this model is none",
    "zenflow": "replaces the optimizer, which is AdamW here",
}
"""Parts of `zero_optimization` that training does not use."""
ELSEWHERE = {"amp": "training.precision", "torch_autocast": "training.precision"}
"""Keys of DeepSpeed whose matter a setting of the run file decides in another way."""


def knob_problems(knobs: Mapping[str, Any]) -> list[str]:
    """One line for each key that is no knob and each value that cannot be; values "auto" are passed over."""
    problems = [
        f"{key} = {short(knobs[key])} does what {setting} of the run file does; remove it from the JSON"
        for key, setting in ELSEWHERE.items()
        if key in knobs
    ]
    zero = knobs.get("zero_optimization", {})
    rest = {key: value for key, value in knobs.items() if key not in (*OWNED, *ELSEWHERE, "zero_optimization")}
    problems += _problems(Knobs, without_autos(rest), "", (*OWNED, "zero_optimization"))
    if not isinstance(zero, Mapping):
        return [*problems, f'zero_optimization = {short(zero)}: must be an object, such as {{"stage": 2}}']
    return problems + _zero_problems(without_autos(zero))


def without_autos(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_autos(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != "auto"
    }


def _zero_problems(zero: Mapping[str, Any]) -> list[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    problems, rest = [], dict(zero)
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        key, extra = field.alias or name, field.json_schema_extra
        if key not in zero:
            continue
        value, wanted = zero[key], other_kind(field.annotation, zero[key])
        if key in NOT_OURS and value is not None:
            wanted = f"{NOT_OURS[key]}; remove it"
        elif isinstance(extra, dict) and extra.get("deprecated"):
            wanted = f"is deprecated in DeepSpeed; use {extra.get('new_param') or 'its newer name'}, or remove it"
        elif key in BUCKETS and not wanted and _is_number(value) and not 1 <= value <= LARGEST_BUCKET:
            wanted = f"must be from 1 to {LARGEST_BUCKET} elements"
        elif not wanted and _is_number(value) and value >= 2**63:
            wanted = f"must be below {2**63}"
        if wanted:
            problems.append(f"zero_optimization.{key} = {short(value)}: {wanted}")
            del rest[key]
    offload = rest.get("offload_optimizer")
    ratio = offload.get("ratio", 1) if isinstance(offload, Mapping) else 1
    if isinstance(offload, Mapping) and _is_number(ratio) and ratio < 1 and rest.get("stage") != 3:
        problems.append(
            f"zero_optimization.offload_optimizer.ratio = {ratio}: needs stage 3; set it to 1, or stage to 3"
        )
        rest["offload_optimizer"] = {key: value for key, value in offload.items() if key != "ratio"}
    problems += _problems(DeepSpeedZeroConfig, rest, "zero_optimization.")
    for part in ("offload_optimizer", "offload_param"):
        values, own = zero.get(part), DeepSpeedZeroConfig.model_fields[part].annotation
        kind = next((item for item in getattr(own, "__args__", ()) if isinstance(item, type)), None)
        if isinstance(values, Mapping) and kind and issubclass(kind, BaseModel):
            for key, field in kind.model_fields.items():
                if key in values and (wanted := other_kind(field.annotation, values[key])):
                    problems.append(f"zero_optimization.{part}.{key} = {short(values[key])}: {wanted}")
    return problems


def _problems(schema: type[BaseModel], values: Mapping[str, Any], prefix: str, more: tuple[str, ...] = ()) -> list[str]:
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        return [_line(schema, item, prefix, more) for item in error.errors()]
    except (ValueError, TypeError, AssertionError, OverflowError) as error:  # raised by DeepSpeed's own validators
        said = " ".join(str(error).split())[:300]
        return [f"{prefix.rstrip('.')}: DeepSpeed refuses it: {said}; remove what it names"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(schema: type[BaseModel], item: Any, prefix: str, more: tuple[str, ...]) -> str:
    key = prefix + ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        *outer, last = (str(part) for part in item["loc"])
        known = [*_names(schema, outer), *(more if not outer else ())]
        return unknown_key(last, known, prefix + "".join(f"{part}." for part in outer))
    if not item["loc"]:  # of the section as a whole
        return f"{prefix.rstrip('.') or 'it'}: {plain(item['msg'])}; set or remove what it names"
    return f"{key} = {short(item['input'])}: {plain(item['msg'])}"


def _names(schema: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = next(item for name, item in schema.model_fields.items() if part in (name, item.alias))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        schema = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [field.alias or name for name, field in schema.model_fields.items()]


def unknown_key(key: str, known: list[str], prefix: str = "") -> str:
    key = key if len(key) <= 100 else f"{key[:60]}…"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    listed = ", ".join(sorted(known)) if len(known) < MANY else f"{len(known)} others, see ds_configs/README.md"
    hint = f"nearest: {', '.join(prefix + item for item in near)}" if near else f"known: {listed}"
    return f"unknown key {prefix}{key}; {hint}"

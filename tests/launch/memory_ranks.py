"""`python -m tests.launch.memory_ranks PLAN RESULT` on every rank: what training really holds, in bytes of tensors.

Rank 0 listens to torch's allocator (the profiler's memory events), kernels' own temporaries included. The profiler
does not see what gloo's threads release, so its running total drifts upwards: only how far a step rises above its own
start is taken from it, the smallest of some steps, and what is held at rest is counted from the tensors themselves.
"""

import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

MARK_BYTES = 12_345_701
STEPS = 3


def rise_of_a_step(profile: Any) -> int:
    """The smallest number of bytes by which a step, from one tensor of MARK_BYTES to the next, rises above its start.

    The first step, in which the optimizer makes its states, does not count.
    """
    events = [item for item in profile.profiler.kineto_results.events() if item.name() == "[memory]"]
    events.sort(key=lambda item: item.start_ns())
    live = start = 0
    rises: list[int] = []
    for item in events:
        if item.nbytes() == MARK_BYTES:
            start = live
            rises.append(0)
        live += item.nbytes()
        if rises and abs(item.nbytes()) != MARK_BYTES:
            rises[-1] = max(rises[-1], live - start)
    assert len(rises) == STEPS
    return min(rises[1:])


def storages() -> dict[int, torch.UntypedStorage]:
    """All tensors' storages, each once, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    return {storage.data_ptr(): storage for storage in (item.untyped_storage() for item in tensors)}


def peak_of_training(overrides: list[str], world: Any) -> int:
    from model.modeling_globallocal import GlobalLocalForCausalLM
    from pipeline.config import load_config
    from pipeline.data.loader import BatchLayout
    from pipeline.engine.engine import deepspeed_config, initialize

    config = load_config("launch/runs/quickstart.yaml", overrides)
    layout = BatchLayout(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    settings = deepspeed_config(config, layout, config.training.precision)
    shape = (layout.micro_batch_size, config.data.sequence_length + 1)
    before = storages()  # of engines that DeepSpeed still holds; held here too, lest an address is used again
    listener = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with listener if world.is_main else nullcontext() as profile:
        model = GlobalLocalForCausalLM(config.model.build(max_position_embeddings=config.data.sequence_length))
        engine = initialize(model, config, settings)
        del model
        for _ in range(STEPS):
            torch.empty(MARK_BYTES, dtype=torch.uint8)
            for _ in range(layout.gradient_accumulation_steps):
                tokens = torch.randint(0, 512, shape)
                output = engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
                engine.backward(output.loss)
                del output
                engine.step()
    if not world.is_main:
        return 0
    at_rest = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    return at_rest + rise_of_a_step(profile)


def main(plan: Path, result: Path) -> None:
    from pipeline.distributed.world import shutdown, start

    world = start()
    peaks = {}
    for name, overrides in json.loads(plan.read_text()).items():
        peaks[name] = peak_of_training(overrides, world)
    if world.is_main:
        result.write_text(json.dumps(peaks))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

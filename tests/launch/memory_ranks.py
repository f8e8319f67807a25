"""`python -m tests.launch.memory_ranks PLAN RESULT` on every rank: what training really holds, in bytes of tensors.

Rank 0 listens to torch's allocator (the profiler's memory events) from before the model is built: the sum of all
allocations and releases is what a device's `max_memory_allocated` would show, kernels' own temporaries included. The
peak is taken over two steps after a first one, in which the optimizer makes its states.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

MARK_BYTES = 12_345_701


def peak_after_mark(profile: Any) -> int:
    """The most bytes alive after a tensor of MARK_BYTES was made."""
    events = [item for item in profile.profiler.kineto_results.events() if item.name() == "[memory]"]
    events.sort(key=lambda item: item.start_ns())
    live = peak = 0
    marked = False
    for item in events:
        live += item.nbytes()
        marked = marked or item.nbytes() == MARK_BYTES
        if marked and item.nbytes() != MARK_BYTES:
            peak = max(peak, live)
    assert marked
    return peak


def peak_of_training(overrides: list[str], world: Any) -> int:
    from model.modeling_globallocal import GlobalLocalForCausalLM
    from pipeline.config import load_config
    from pipeline.data import BatchLayout
    from pipeline.engine import deepspeed_config, initialize

    config = load_config("launch/runs/quickstart.yaml", overrides)
    layout = BatchLayout(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    settings = deepspeed_config(config, layout, config.training.precision)
    shape = (layout.micro_batch_size, config.data.sequence_length + 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = GlobalLocalForCausalLM(config.model.build(max_position_embeddings=config.data.sequence_length))
        engine = initialize(model, config, settings)
        del model
        for step in range(3):
            if step == 1:
                torch.empty(MARK_BYTES, dtype=torch.uint8)
            for _ in range(layout.gradient_accumulation_steps):
                tokens = torch.randint(0, 512, shape)
                output = engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
                engine.backward(output.loss)
                del output
                engine.step()
    return peak_after_mark(profile)


def main(plan: Path, result: Path) -> None:
    from pipeline.distributed import shutdown, start

    world = start()
    peaks = {}
    for name, overrides in json.loads(plan.read_text()).items():
        peaks[name] = peak_of_training(overrides, world)
        gc.collect()  # an engine that is released while the next one is measured would count against it
    if world.is_main:
        result.write_text(json.dumps(peaks))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

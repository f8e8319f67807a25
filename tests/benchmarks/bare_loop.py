"""A DeepSpeed loop and nothing around it, with the settings of a run: what the trainer's speed is compared with.

`python -m tests.benchmarks.bare_loop RUN.yaml section.key=value …` trains on one batch of made-up tokens, its blocks
compiled where the run's are, and prints tokens per second: the median of windows of `WINDOW` steps.
"""

import statistics
import sys
import time

import deepspeed
import torch

import pipeline.engine.lean_import  # noqa: F401  # before all that imports DeepSpeed
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.config import load_config
from pipeline.distributed.world import shutdown, start
from pipeline.engine.compilation import compile_blocks
from pipeline.engine.engine import resolve_precision
from pipeline.engine.optim import build_optimizer, parameter_groups
from pipeline.fitting import fit
from tests.benchmarks.gpu_passes import synchronize

WINDOWS, WINDOW = 6, 5


def main(run_file: str, *overrides: str) -> None:
    world = start()
    config = load_config(run_file, overrides)
    precision = resolve_precision(config.training.precision, world)
    context = fit(config, world.size, precision, world.device).context(config, world, precision)
    model = GlobalLocalForCausalLM(context.model)
    torch.nn.Module.to(model, world.device)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer, offload=False)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=context.deepspeed)[0]
    micro_batch, length = context.layout.micro_batch_size, config.data.sequence_length
    if context.compiled:
        compile_blocks(engine, micro_batch, length)
    tokens = torch.randint(context.model.vocab_size, (micro_batch, length + 1), device=world.device)
    seconds = []
    for _ in range(WINDOWS + 1):
        synchronize()
        begin = time.perf_counter()
        for _ in range(WINDOW * context.layout.gradient_accumulation_steps):
            engine.backward(engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss)
            engine.step()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    tokens_in_a_window = WINDOW * context.layout.global_batch_size * length
    print(f"{tokens_in_a_window / statistics.median(seconds[1:])} tokens/s of the bare loop", flush=True)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Settings of a model that is small, and yet large beside what a process needs by itself."""

MODEL = [
    "model.hidden_size=256",
    "model.num_hidden_layers=4",
    "model.vocab_size=512",
    "model.pool_size=512",
    "model.pool_dim=64",
    "model.router_hidden_size=64",
    "data.sequence_length=64",
    "data.dataset=none",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.precision=fp32",
]

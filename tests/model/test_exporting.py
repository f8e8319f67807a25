"""One graph for every batch and every length: what `torch.export` makes of the model."""

import pytest
import torch
from torch.export import Dim

from tests.model.helpers import LAYOUTS, make_model, random_ids, tiny_config


@pytest.mark.parametrize("layout", ["summary", "delta", "delta, documents apart", "product keys", "wide pool"])
def test_one_graph_serves_every_batch_and_length(layout):
    model = make_model(tiny_config(**LAYOUTS[layout]), dtype=torch.float32)
    dynamic = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(model, (), {"input_ids": random_ids(model.config, 2, 7)}, dynamic_shapes=dynamic)
    exported = program.module()
    for batch, length in ((1, 1), (3, 2), (2, 150)):
        ids = random_ids(model.config, batch, length)
        torch.testing.assert_close(exported(input_ids=ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    named = {str(node.target) for node in program.graph.nodes}
    assert not {name for name in named if "sort" in name or "globallocal" in name}

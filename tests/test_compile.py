"""`torch.compile` of a whole model: the same numbers, and no graph breaks but where PTE decides about segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from models import tiny_model, with_adapter
from torch._dynamo.utils import counters

from peft_pte.families import find_decoder

IDS = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(24) < 6, -100)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model: torch.nn.Module, call: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = call(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("regional", [False, True], ids=["model", "layers"])
def test_training_step(regional: bool) -> None:
    """Compiled as a whole, or layer by layer as is advised: there nothing breaks."""
    model = with_adapter(tiny_model("llama"), window_size=6, eviction_ratio=0.5).train()
    expected, own = gradients(model, model)
    if regional:
        for layer in find_decoder(model).layers:
            layer.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    loss, found = gradients(model, compiled)
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert found.keys() == own.keys()
    scale = max(gradient.abs().max() for gradient in own.values())
    assert all((found[name] - own[name]).abs().max() <= 1e-9 * scale for name in own)
    breaks = Counter(counters["graph_break"])
    if regional:
        assert not breaks
    else:  # at the hook of the model and the wrapper of the decoder, once for each frame around them
        assert breaks.total() <= 5 and all("torch.compiler.disable" in reason for reason in breaks), breaks
    assert counters["stats"]["unique_graphs"] >= 2  # something was compiled

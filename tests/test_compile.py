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


@pytest.mark.parametrize("way", ["plain", "checkpointed", "truncated"])
def test_layers_share_their_graphs(way: str) -> None:
    """However deep the model, the same few graphs: as many as there are kinds of segments, and not more in a new step.

    A layer of its own for each would end at the compiler's limit of recompilations, and run as it is beyond.
    """
    settings = dict(gradient="truncated") if way == "truncated" else {}
    found = []
    for num_layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        base = tiny_model("llama", num_hidden_layers=num_layers)
        model = with_adapter(base, window_size=6, eviction_ratio=0.5, **settings).train()
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        expected, own = gradients(model, model)
        for layer in find_decoder(model).layers:
            layer.compile(backend="eager")
        for _ in range(2):
            loss, compiled = gradients(model, model)
            assert torch.allclose(loss, expected, rtol=1e-6)
            scale = max(gradient.abs().max() for gradient in own.values())
            assert all((compiled[name] - own[name]).abs().max() <= 1e-9 * scale for name in own)
            found.append(counters["stats"]["unique_graphs"])
            model.eval().generate(IDS, max_new_tokens=8, do_sample=False)  # steps with a cache are not compiled
            model.train()
        assert not counters["graph_break"]
    assert len(set(found)) == 1 and found[0] <= 6, found

"""PTE on quantised base models, on the CPU; each needs its library: `pip install -e ".[quantized]"`.

In all of them a model is trained before it is evaluated, or is not trained: on the CPU bitsandbytes packs 4-bit weights
for inference at the first forward in eval mode, and has no gradient through them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import decode, tiny_model, with_adapter
from peft import PeftModel
from quantized_bases import BASES
from torch import nn
from transformers import DynamicCache

from peft_pte import PTECache
from peft_pte.encoder import ThoughtEncoder
from peft_pte.layer import Linear

PROMPT, LENGTH = 6, 40
IDS = torch.randint(3, 64, (16, LENGTH), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(LENGTH) < PROMPT, -100)
STEPS = [PROMPT] + [1] * (LENGTH - PROMPT)
WINDOW = dict(window_size=8, eviction_ratio=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before it is quantised; widths are multiples of the libraries' blocks."""
    folder = tmp_path_factory.mktemp("base")
    sizes = dict(hidden_size=64, intermediate_size=128, vocab_size=64)
    tiny_model("llama", torch.float32, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(params=BASES)
def load(request: pytest.FixtureRequest, folder: Path) -> Callable[[], nn.Module]:
    return lambda: BASES[request.param](folder)


def nats(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Differences of log-probabilities."""
    return (actual.log_softmax(-1) - expected.log_softmax(-1)).abs()


def replayed(model: nn.Module) -> torch.Tensor:
    """The logits of a forward with labels."""
    with torch.no_grad():
        return model(input_ids=IDS, labels=LABELS).logits


def test_trains(load: Callable[[], nn.Module]) -> None:
    """All projections are adapted, every adapter parameter gets a gradient, and the loss falls."""
    model = with_adapter(load(), r=8, pte_alpha=4, **WINDOW).train()
    for layer in model.base_model.model.model.layers:
        adapted = {name for name, child in layer.self_attn.named_children() if isinstance(child, Linear)}
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert isinstance(layer.self_attn.thought_encoder, ThoughtEncoder)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("pte_" in name and p.dtype == torch.float32 for name, p in trained.items())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS[:4], labels=LABELS[:4]).loss
        loss.backward()
        for name, p in trained.items():
            assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses


def test_generates_past_the_window(load: Callable[[], nn.Module]) -> None:
    """What is generated is what decoding by hand finds best, in a cache that stops growing."""
    model = with_adapter(load(), **WINDOW)
    prompt, sizes = IDS[:, :PROMPT], []
    for length in (20, LENGTH):
        cache = PTECache()
        ids = model.generate(
            input_ids=prompt, max_length=length, do_sample=False, past_key_values=cache, eos_token_id=None
        )
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] and min(cache.num_evicted) > 20
    logits, _ = decode(model, ids, None, STEPS)
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), ids[:, PROMPT:])


def test_saved_and_loaded(load: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = with_adapter(load(), **WINDOW)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert float(nats(replayed(loaded), replayed(model)).max()) <= 1e-5


def test_replay_is_decoding(load: Callable[[], nn.Module]) -> None:
    """Equal where the base's layers see the same rows together; token by token, as far as the base allows.

    Quantised layers may round activations: to 8 bits, with outliers looked for in all rows of a call (bitsandbytes
    int8), so that a token's result depends on the tokens beside it; or to bfloat16 (nf4 on the CPU), so that the last
    bits of float32 now and then become large. How large is measured on the base without PTE: whole sequences against
    token by token, with embeddings that differ by 1e-6 of themselves.
    """
    base = load()
    with torch.no_grad():
        embeds = base.get_input_embeddings()(IDS)
        noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))
        whole, cache = base(input_ids=IDS).logits, DynamicCache()
        parts = (embeds * (1 + 1e-6 * noise)).split(STEPS, dim=1)
        steps = torch.cat([base(inputs_embeds=part, past_key_values=cache).logits for part in parts], dim=1)
    of_base = nats(steps, whole)

    model = with_adapter(base, **WINDOW)
    replay = replayed(model)
    in_segments, cache = decode(model, IDS, None, [LENGTH], prompt_lengths=PROMPT)
    assert min(cache.num_evicted) > 20
    assert float(nats(in_segments, replay).max()) <= 1e-5
    by_token, _ = decode(model, IDS, None, STEPS)
    found = nats(by_token, replay)
    print(f"nats, largest (mean): base {of_base.max():.1e} ({of_base.mean():.1e})", end=", ")
    print(f"PTE {found.max():.1e} ({found.mean():.1e})")
    assert float(found.mean()) <= 3 * float(of_base.mean())
    assert float(found.max()) <= 4 * float(of_base.max())
    assert float(nats(replay, whole).mean()) > 5 * float(found.mean())  # the adapter and the window matter

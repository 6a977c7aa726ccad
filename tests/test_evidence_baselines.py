"""What the evidence is compared with: text that is given again, and caches that are compressed."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from peft import get_peft_model
from transformers import DynamicCache

from baselines import compressed, delethink, given_again, slots
from peft_pte import PTECache, PTEConfig
from streams import Stream, answers

PROMPT = 3


def stream(length: int = 20, scored: tuple[int, ...] = (18, 19)) -> Stream:
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[:, list(scored)] = True
    return Stream(ids, mask, mask)


def full(model: torch.nn.Module, read: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    columns = read.scored[0].nonzero()[:, 0]
    with torch.no_grad():
        return answers(model(input_ids=read.input_ids).logits[:, columns - 1], read.input_ids, columns)


class Press:
    """In place of one of kvpress: keeps the last `target_size` tokens of a cache, every few steps."""

    def __init__(self, base_press: object, compression_interval: int, target_size: int):
        self.interval, self.target, self.steps = compression_interval, target_size, dict[int, int]()

    @contextlib.contextmanager
    def __call__(self, model: torch.nn.Module):
        def shorten(module: torch.nn.Module, args: object, kwargs: dict, output: object) -> None:
            if len(kwargs["cache_position"]) == 1:
                step = self.steps[module.layer_idx] = self.steps.get(module.layer_idx, 0) + 1
                if step % self.interval == 0:
                    layer = kwargs["past_key_values"].layers[module.layer_idx]
                    layer.keys, layer.values = (x[:, :, -self.target :] for x in (layer.keys, layer.values))

        layers = [layer.self_attn for layer in model.model.layers]
        handles = [layer.register_forward_hook(shorten, with_kwargs=True) for layer in layers]
        yield
        for handle in handles:
            handle.remove()


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(DecodingPress=Press, KnormPress=lambda: None)
    monkeypatch.setitem(sys.modules, "kvpress", module)


@pytest.mark.parametrize("answer", [delethink, partial(compressed, "KnormPress")])
def test_where_all_fits_it_is_the_full_cache(answer, kvpress: None) -> None:
    model, read = tiny_model("llama").eval(), stream()
    for here, there in zip(answer(model, read, PROMPT, 100), full(model, read)):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_chunks_by_hand() -> None:
    """Prompt of 3 and chunks of 11: four of the eight tokens that a chunk has of its own are given again."""
    starts = [given_again(length, PROMPT, 11, 4) for length in range(3, 24)]
    assert starts == [3] * 9 + [7] * 4 + [11] * 4 + [15] * 4
    model, read = tiny_model("llama").eval(), stream()
    nll, hits = delethink(model, read, PROMPT, 11)
    for i, column in enumerate((18, 19)):  # 16 tokens and 17 have been written behind the prompt
        kept = torch.cat([read.input_ids[:, :PROMPT], read.input_ids[:, 11 : column + 1]], 1)
        expected = full(model, Stream(kept, *[(torch.arange(kept.shape[1]) == kept.shape[1] - 1).repeat(2, 1)] * 2))
        torch.testing.assert_close(nll[:, i : i + 1], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(hits[:, i : i + 1], expected[1])


def test_a_compressed_cache_by_hand(kvpress: None) -> None:
    """Eight tokens fit, three leave at once: as an own loop over the cache, with positions that go on."""
    model, read = tiny_model("llama").eval(), stream()
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(input_ids=read.input_ids[:, :PROMPT], past_key_values=cache)
        for column in range(PROMPT, 19):
            place = torch.full((2, 1), column)
            output = model(input_ids=read.input_ids[:, [column]], past_key_values=cache, position_ids=place)
            logits += [output.logits] if column >= 17 else []
            if (column - PROMPT + 1) % 3 == 0:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, -5:], layer.values[:, :, -5:]
    expected = answers(torch.cat(logits, 1), read.input_ids, torch.tensor([18, 19]))
    for here, there in zip(compressed("KnormPress", model, read, PROMPT, 8), expected):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert (compressed("KnormPress", model, read, PROMPT, 8)[0] - full(model, read)[0]).abs().max() > 1e-3


def test_bytes_are_those_of_pte() -> None:
    """At least those of the cache, and less than one slot more."""
    base = tiny_model("llama").float().eval()
    config = PTEConfig(task_type="CAUSAL_LM", r=8, pte_alpha=4, num_global_tokens=4, window_size=16, eviction_ratio=0.5)
    count, dtype = slots(base, PROMPT, 16, 8), base.dtype
    in_slot = 2 * base.config.num_key_value_heads * base.config.head_dim * dtype.itemsize
    model, cache = get_peft_model(base, config), PTECache()
    with torch.no_grad():
        model(input_ids=stream(40).input_ids, past_key_values=cache, prompt_lengths=PROMPT)
    layer = cache.layers[0]
    of_states = sum(x[0].nbytes for name in layer.states for x in (layer.states[name], layer.cores[name]))
    assert 0 <= count * in_slot - (of_states + (PROMPT + 16) * in_slot) < in_slot


def test_kvpress_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match="pip install --no-deps kvpress"):
        compressed("KnormPress", tiny_model("llama"), stream(), PROMPT, 8)

"""Calls that cannot be honoured are refused by name, as configurations and models are in test_errors.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import decode, tiny_model, with_adapter
from peft import PeftModel
from transformers import DynamicCache, StaticCache

from peft_pte import PTECache, PTEConfig

IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def filled(model: PeftModel, attention_mask: torch.Tensor | None = None) -> PTECache:
    return decode(model, IDS, attention_mask, [20])[1]


def filled_by_base(model: PeftModel, cache: DynamicCache) -> DynamicCache:
    with model.disable_adapter(), torch.no_grad():
        return model(input_ids=IDS, past_key_values=cache).past_key_values


def offloading() -> DynamicCache:
    """As `DynamicCache(offloading=True)`, which a torch for CUDA cannot make on a machine without a GPU."""
    cache = DynamicCache()
    cache.offloading = True
    return cache


def generate(model: PeftModel, **options: Any) -> None:
    model.generate(input_ids=IDS, max_new_tokens=4, **options)


def with_second_adapter(model: PeftModel, **config: Any) -> None:
    model.add_adapter("other", PTEConfig(r=5, **config))
    model.base_model.set_adapter(["default", "other"])


def change_adapter(model: PeftModel) -> None:
    cache = filled(model)
    model.add_adapter("other", PTEConfig(r=5, window_size=6))
    model.set_adapter("other")
    model(input_ids=IDS[:, :1], past_key_values=cache)


def off_with_cache(model: PeftModel) -> None:
    cache = filled(model)
    with model.disable_adapter():
        model(input_ids=IDS[:, :1], past_key_values=cache)


def reentrant(model: PeftModel) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(input_ids=IDS, prompt_lengths=5)


def two_policies(model: PeftModel) -> None:
    with_second_adapter(model, window_size=7)
    model(input_ids=IDS)


CALL_ERRORS: list[tuple[str, Callable[[PeftModel], Any], type[Exception], str]] = [
    ("no border in training", lambda m: m(input_ids=IDS), ValueError, "cannot tell where the prompt ends"),
    (
        "no border, no cache",
        lambda m: m.eval()(input_ids=IDS, use_cache=False),
        ValueError,
        "(20 tokens) is longer than the window (window_size=6). Pass `prompt_lengths`",
    ),
    (
        "too few prompt lengths",
        lambda m: m(input_ids=IDS, prompt_lengths=[3]),
        ValueError,
        "`prompt_lengths` must hold one integer in [0, 20] for each of the 2 rows",
    ),
    ("prompt length too large", lambda m: m(input_ids=IDS, prompt_lengths=21), ValueError, "integer in [0, 20]"),
    ("prompt length a float", lambda m: m(input_ids=IDS, prompt_lengths=2.5), ValueError, "got 2.5"),
    (
        "a shorter prompt with a filled cache",
        lambda m: m(input_ids=IDS, prompt_lengths=5, past_key_values=filled(m)),
        ValueError,
        "The prompt is to have 5 columns, but this cache was told 20 and has seen 20",
    ),
    (
        "ragged borders with a cache",
        lambda m: m(input_ids=IDS, prompt_lengths=[3, 5], use_cache=True),
        ValueError,
        "the borders are [3, 5]: pad prompts on the left",
    ),
    (
        "4-D mask",
        lambda m: m(input_ids=IDS, attention_mask=torch.ones(2, 1, 20, 20), prompt_lengths=5),
        ValueError,
        "`attention_mask` is a 4-D tensor, but PTE needs the 2-D padding mask",
    ),
    (
        "dict of masks",
        lambda m: m(input_ids=IDS, attention_mask={"full_attention": None}, prompt_lengths=5),
        ValueError,
        "`attention_mask` is a dict",
    ),
    (
        "mask of the new tokens only",
        lambda m: m(input_ids=IDS[:, :1], attention_mask=torch.ones(2, 1), past_key_values=filled(m)),
        ValueError,
        "must be (2, 21), evicted columns included",
    ),
    (
        "a mask that is forgotten after the prefill",
        lambda m: m(input_ids=IDS[:, :1], past_key_values=filled(m, torch.ones(2, 20).tril(18).flip(1))),
        ValueError,
        "`attention_mask` is missing, but the cache has seen 20 columns with padding",
    ),
    (
        "packed positions",
        lambda m: m(input_ids=IDS, position_ids=(torch.arange(20) % 10)[None], prompt_lengths=5),
        ValueError,
        "packed sequences",
    ),
    (
        "packed lengths",
        lambda m: m(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 10, 20]), prompt_lengths=5),
        ValueError,
        "PTE got `cu_seq_lens_q`",
    ),
    (
        "positions of another shape",
        lambda m: m(input_ids=IDS, position_ids=torch.arange(20).expand(3, 2, 20), prompt_lengths=5),
        ValueError,
        "`position_ids` has shape (3, 2, 20)",
    ),
    (
        "attention maps across segments",
        lambda m: m(input_ids=IDS, prompt_lengths=5, output_attentions=True),
        ValueError,
        "`attentions` cannot be returned",
    ),
    ("reentrant checkpointing", reentrant, ValueError, "does not support reentrant gradient checkpointing"),
    ("two policies", two_policies, ValueError, "The active adapters want different caches"),
    ("a cache changes hands", change_adapter, ValueError, "A cache cannot change hands"),
    ("adapter off with its cache", off_with_cache, ValueError, "The PTE adapter is off, but `past_key_values`"),
    (
        "cache filled by the base model",
        lambda m: m(input_ids=IDS[:, :1], past_key_values=filled_by_base(m, DynamicCache())),
        ValueError,
        "a DynamicCache that already holds 20 tokens",
    ),
    (
        "own cache filled with the adapter off",
        lambda m: m(input_ids=IDS[:, :1], past_key_values=filled_by_base(m, PTECache())),
        ValueError,
        "a PTECache that already holds 20 tokens",
    ),
    (
        "other number of rows",
        lambda m: m(input_ids=IDS[:1, :1], past_key_values=filled(m)),
        ValueError,
        "holds 2 rows, but the input has 1",
    ),
    ("rolling back", lambda m: filled(m).crop(-1), ValueError, "PTECache cannot be rolled back"),
    (
        "static cache",
        lambda m: generate(m, past_key_values=StaticCache(config=m.config, max_cache_len=32)),
        ValueError,
        "`past_key_values` is a StaticCache, but PTE keeps its thoughts in a PTECache",
    ),
    (
        "offloaded cache",
        lambda m: generate(m, past_key_values=offloading()),
        ValueError,
        "is a DynamicCache with offloading",
    ),
    *(
        (
            f"cache_implementation={name}",
            lambda m, name=name: generate(m, cache_implementation=name),
            ValueError,
            f"`cache_implementation='{name}'` is not supported with PTE",
        )
        for name in ("static", "offloaded", "quantized", "paged")
    ),
    ("assisted decoding", lambda m: generate(m, assistant_model=m), ValueError, "Assisted, speculative"),
    (
        "prompt lookup",
        lambda m: generate(m, prompt_lookup_num_tokens=3),
        ValueError,
        "`prompt_lookup_num_tokens=3` is not supported",
    ),
    ("guidance", lambda m: generate(m, guidance_scale=1.5), ValueError, "`guidance_scale=1.5` is not supported"),
    ("DoLa", lambda m: generate(m, dola_layers="low"), ValueError, "`dola_layers='low'` is not supported"),
    (
        "continuous batching",
        lambda m: m.generate_batch(inputs=[[3, 4, 5]]),
        ValueError,
        "Continuous batching (`generate_batch`, paged attention) is not supported",
    ),
    ("merging", lambda m: m.merge_and_unload(), NotImplementedError, "PTE cannot be merged into the base weights"),
    ("merging in place", lambda m: m.merge_adapter(), NotImplementedError, "PTE cannot be merged"),
    (
        "weighted adapters",
        lambda m: m.base_model.add_weighted_adapter(["default"], [1.0], "sum"),
        NotImplementedError,
        "PTE cannot be merged",
    ),
    (
        "mixed batches",
        lambda m: m(input_ids=IDS, adapter_names=["default", "__base__"]),
        ValueError,
        "PTE does not support `adapter_names`",
    ),
    (
        "a projection alone",
        lambda m: m.get_base_model().model.layers[0].self_attn.q_proj(torch.zeros(1, 1, 32, dtype=torch.float64)),
        RuntimeError,
        "called outside of its attention module",
    ),
    (
        "a layer without the cache",
        lambda m: m.get_base_model().model.layers[0](
            torch.zeros(1, 1, 32, dtype=torch.float64),
            position_embeddings=m.get_base_model().model.rotary_emb(torch.zeros(1, dtype=torch.float64), IDS[:1, :1]),
        ),
        RuntimeError,
        "would be lost in silence",
    ),
]


@pytest.mark.parametrize("act, kind, message", [row[1:] for row in CALL_ERRORS], ids=[row[0] for row in CALL_ERRORS])
def test_calls(act: Callable, kind: type[Exception], message: str) -> None:
    model = with_adapter(tiny_model("llama"), window_size=6)
    with pytest.raises(kind, match=re.escape(message)):
        act(model)
    # An error leaves nothing behind: the model still works.
    model.base_model.set_adapter("default")
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        assert model.eval()(input_ids=IDS, prompt_lengths=5).logits.isfinite().all()


def test_long_prefill_needs_no_border() -> None:
    """Without gradients and with the cache on, a whole input is a prompt; so is it with an explicit `use_cache`.

    The first might be meant as a text to be scored, so it is not done in silence: the caller's line is warned of, once.
    """
    model = with_adapter(tiny_model("llama"), window_size=6)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for length in (20, 19):
            prefill = model(input_ids=IDS[:, :length])
        (warning,) = caught
        assert "outside of `generate` with more tokens than its window" in str(warning.message)
        assert warning.filename == __file__
        warnings.simplefilter("error", UserWarning)
        prefill = model(input_ids=IDS, use_cache=True)
        model(input_ids=IDS, prompt_lengths=5)
        model(input_ids=IDS[:, :6])  # fits
        model.generate(input_ids=IDS, max_new_tokens=2)
    assert prefill.past_key_values.num_evicted == [0, 0]
    assert torch.equal(model(input_ids=IDS, use_cache=True).logits, prefill.logits)
    streaming = with_adapter(tiny_model("llama"), window_size=6, retained_prefix=2)
    assert streaming(input_ids=IDS).logits.isfinite().all()  # an integer prefix needs no border either

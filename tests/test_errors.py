"""Bad input gets a clear exception that names the field, the value and what to do; nothing is silently ignored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import SIZES, decode, tiny_model, with_adapter
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache

from peft_pte import PTECache, PTEConfig

CONFIG_ERRORS: list[tuple[dict[str, Any], str]] = [
    (dict(r=0), "PTEConfig: `r` is 0, but must be a positive integer."),
    (dict(r=2.5), "PTEConfig: `r` is 2.5, but must be a positive integer."),
    (dict(r=True), "PTEConfig: `r` is True, but must be a positive integer."),
    (dict(num_global_tokens=-1), "PTEConfig: `num_global_tokens` is -1, but must be an integer >= 0."),
    (dict(pte_alpha=0), "PTEConfig: `pte_alpha` is 0, but must be a positive number."),
    (
        dict(alpha_pattern=8),
        "PTEConfig: `alpha_pattern` is 8, but must be a dictionary of names, or regular expressions, and positive "
        "numbers.",
    ),
    (
        dict(alpha_pattern={"(o_proj": 1}),
        "PTEConfig: `alpha_pattern` is {'(o_proj': 1}, but must be a dictionary of names, or regular expressions, and "
        "positive numbers.",
    ),
    (
        dict(alpha_pattern={"o_proj": 0}),
        "PTEConfig: `alpha_pattern` is {'o_proj': 0}, but must be a dictionary of names, or regular expressions, and "
        "positive numbers.",
    ),
    (dict(pte_dropout=1.0), "PTEConfig: `pte_dropout` is 1.0, but must be in [0, 1)."),
    (dict(window_size=0), "PTEConfig: `window_size` is 0, but must be a positive integer or 'prompt'."),
    (dict(window_size="all"), "PTEConfig: `window_size` is 'all', but must be a positive integer or 'prompt'."),
    (dict(eviction_ratio=0.0), "PTEConfig: `eviction_ratio` is 0.0, but must be in (0, 1]."),
    (dict(eviction_ratio=25), "PTEConfig: `eviction_ratio` is 25, but must be in (0, 1]."),
    (dict(eviction_policy="h2o"), "PTEConfig: `eviction_policy` is 'h2o', but must be one of 'sliding_window'."),
    (dict(retained_prefix=-1), "PTEConfig: `retained_prefix` is -1, but must be 'prompt' or an integer >= 0."),
    (
        dict(window_size="prompt", retained_prefix=4),
        "PTEConfig: `window_size` is 'prompt', but that needs retained_prefix='prompt': with a prompt that streams "
        "through the window, give an integer.",
    ),
    (dict(state_update="mean"), "PTEConfig: `state_update` is 'mean', but must be one of 'delta', 'sum', 'none'."),
    (dict(state_norm="l2"), "PTEConfig: `state_norm` is 'l2', but must be one of 'bound', 'read', 'write', 'none'."),
    (
        dict(state_norm="write"),
        "PTEConfig: `state_norm` is 'write', but only state_update='sum' is normalised on write; use 'bound', 'read' "
        "or 'none'.",
    ),
    (
        dict(state_norm="bound", state_update="none"),
        "PTEConfig: `state_norm` is 'bound', but with state_update='none' nothing is written that could be bounded: "
        "'read' or 'none'.",
    ),
    (dict(state_norm_type="max"), "PTEConfig: `state_norm_type` is 'max', but must be one of 'row', 'frobenius'."),
    (dict(conv_size=0), "PTEConfig: `conv_size` is 0, but must be a positive integer or None."),
    (dict(conv_size=2.0), "PTEConfig: `conv_size` is 2.0, but must be a positive integer or None."),
    (
        dict(write_gate=True, state_update="sum"),
        "PTEConfig: `write_gate` is True, but only state_update='delta' has strengths of writing: leave it out.",
    ),
    (
        dict(conv_size=2, state_update="none"),
        "PTEConfig: `conv_size` is 2, but with state_update='none' no keys are written: leave it out.",
    ),
    (
        dict(output_source="heads"),
        "PTEConfig: `output_source` is 'heads', but must be one of 'hidden_states', 'attention_output'.",
    ),
    (dict(output_gate="sigmoid"), "PTEConfig: `output_gate` is 'sigmoid', but must be True, False or None."),
    (
        dict(encode_keys="rope"),
        "PTEConfig: `encode_keys` is 'rope', but must be one of 'pre_rope', 'chunk', 'post_rope'.",
    ),
    (dict(gradient="none"), "PTEConfig: `gradient` is 'none', but must be one of 'full', 'truncated'."),
    (
        dict(state_update="none", num_global_tokens=0),
        "PTEConfig: `num_global_tokens` is 0, but with state_update='none' the state would always be zero: use 1 or "
        "more.",
    ),
    (
        dict(init_weights="gaussian"),
        "PTEConfig: `init_weights` is 'gaussian', but must be True, False or 'attention'.",
    ),
    *(
        (
            dict(init_weights="attention", **other),
            "PTEConfig: `init_weights` is 'attention', but what is asked as attention asks keys is the delta rule's "
            "memory at the output projection: state_update='delta' and output_source='hidden_states', or "
            "init_weights=True.",
        )
        for other in (dict(output_source="attention_output"), dict(state_update="sum"))
    ),
    (dict(write_gate=1), "PTEConfig: `write_gate` is 1, but must be True or False."),
    (
        dict(layers_pattern="layers"),
        "PTEConfig: `layers_pattern` is 'layers', but has no effect without `layers_to_transform`: give both or "
        "neither.",
    ),
    (
        dict(target_modules="q_proj", layers_to_transform=[0]),
        "PTEConfig: `layers_to_transform` is [0], but cannot be combined with a regular expression in "
        "`target_modules`.",
    ),
]


@pytest.mark.parametrize("fields, message", CONFIG_ERRORS, ids=lambda x: str(x)[:40])
def test_config(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PTEConfig(**fields)
    assert str(error.value) == message


def test_paper_settings() -> None:
    config = PTEConfig.paper(task_type="CAUSAL_LM")
    assert (config.r, config.num_global_tokens, config.window_size, config.eviction_ratio) == (32, 32, "prompt", 0.25)
    assert (config.state_update, config.state_norm, config.retained_prefix) == ("sum", "write", "prompt")
    assert PTEConfig.paper(window_size=768).window_size == 768
    assert (PTEConfig.paper().pte_alpha, PTEConfig.paper(r=8).pte_alpha) == (32, 8)  # scaling 1
    assert (PTEConfig().state_update, PTEConfig().state_norm, PTEConfig().pte_alpha) == ("delta", "bound", 16)
    assert (PTEConfig().conv_size, PTEConfig(state_update="sum").conv_size) == (2, 1)
    assert PTEConfig(state_update="none").conv_size == 1
    paper = PTEConfig.paper()
    assert (paper.conv_size, paper.output_source, paper.output_gate) == (1, "attention_output", False)
    assert (PTEConfig().output_gate, PTEConfig(output_source="attention_output").output_gate) == (True, False)
    assert PTEConfig(state_update="sum").state_norm == "read"


def build(name: str, **config: Any) -> torch.nn.Module:
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(SIZES | config)))


def gemma3() -> torch.nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, head_dim=8))


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4))


def t5() -> torch.nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )


def deepseek() -> torch.nn.Module:
    small = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    return build("DeepseekV3", **small, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)


MODEL_ERRORS: list[tuple[str, Callable[[], torch.nn.Module], str]] = [
    ("sliding window", lambda: build("Mistral", sliding_window=128), "layers of type sliding_attention"),
    ("hybrid", gemma3, "layers of type sliding_attention"),
    ("encoder-decoder", t5, "it is an encoder-decoder"),
    ("no rotary positions", gpt2, "found 0. Supported are Llama"),
    ("latent attention", deepseek, "Multi-head latent attention (MLA)"),
    (
        "dynamic rope",
        lambda: build("Llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        "its rotary embedding (dynamic) depends on the length of each forward",
    ),
    ("not a language model", lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), "it has no `config`"),
]


@pytest.mark.parametrize("make, message", [row[1:] for row in MODEL_ERRORS], ids=[row[0] for row in MODEL_ERRORS])
def test_models_are_refused_with_a_reason_and_left_alone(make: Callable, message: str) -> None:
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, PTEConfig(r=4))
    assert [name for name, _ in model.named_modules()] == before


def test_sliding_window_as_long_as_the_model_is_accepted() -> None:
    model = build("Mistral", sliding_window=32768).double().eval()
    model = with_adapter(model, window_size=4)
    ids = torch.randint(3, 61, (1, 20))
    logits, _ = decode(model, ids, None, [5] + [1] * 15)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, prompt_lengths=5).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(target_modules=["q_proj", "gate_proj"]), "'model.layers.0.mlp.gate_proj', which is not a projection"),
        (dict(target_modules="all-linear"), "`target_modules` is 'all-linear', but PTE adapts attention"),
        (dict(target_modules=["lm_head"]), "matches 'lm_head', which is not a projection"),
        (
            dict(alpha_pattern={"o_proj": 1, r"layers\.9\..*": 2}),
            "has ['layers\\\\.9\\\\..*'], which is the first pattern",
        ),
        (
            dict(alpha_pattern={"o_proj": 1, r"layers\.0\.self_attn\.o_proj": 2}),
            "which is the first pattern of no adapted",
        ),
        (dict(target_modules=["nothing"]), "not found in the base model"),
    ],
)
def test_targets(config: dict[str, Any], message: str) -> None:
    base = tiny_model("llama")
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(base, PTEConfig(**config))
    assert not any("pte" in name or "thought" in name for name, _ in base.named_modules())


# --------------------------------------------------------------------------------------------------------------- calls

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

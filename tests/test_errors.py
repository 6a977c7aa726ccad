"""Bad input gets a clear exception that names the field, the value and what to do; nothing is silently ignored:
fields of the configuration, and models. Calls are in test_errors_of_calls.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import SIZES, decode, tiny_model, with_adapter
from peft import get_peft_model

from peft_pte import PTEConfig

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

"""Tiny models of the supported families, built from configurations, and adapters on them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import transformers
from float64 import make_exact_float64
from peft import PeftModel, get_peft_model

from peft_pte import PTEConfig

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
    attn_implementation="sdpa",
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
}
# Attached and decoded like the others, but without an independent reference.
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", {}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "cohere": ("Cohere", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "phi": ("Phi", {}),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random model in eval mode; in float64 with norms and rotary tables in float64 too."""
    name, special = (FAMILIES | RELATIVES)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(SIZES | special | overrides))
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    if dtype == torch.float64:
        make_exact_float64(model)
    return model


def with_adapter(base: torch.nn.Module, seed: int = 1, **config: Any) -> PeftModel:
    """Wrap a model; by default with random `A`, so that the state matters."""
    torch.manual_seed(seed)
    settings = dict(task_type="CAUSAL_LM", r=5, num_global_tokens=3, pte_alpha=8, init_weights=False)
    return get_peft_model(base, PTEConfig(**(settings | config))).eval()


def decode(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, sizes: list[int], cache=None, **kwargs
):
    """Feed `ids` [B, T] in calls of the given sizes; returns the logits [B, T, vocab] and the cache."""
    from peft_pte import PTECache

    cache = PTECache() if cache is None else cache
    seen, outputs = cache.get_seq_length(), []
    start = 0
    with torch.no_grad():
        for size in sizes:
            columns = slice(start, start + size)
            step_mask = None if mask is None else mask[:, : seen + start + size]
            output = model(input_ids=ids[:, columns], attention_mask=step_mask, past_key_values=cache, **kwargs)
            outputs.append(output.logits)
            start += size
    assert start == ids.shape[1]
    return torch.cat(outputs, dim=1), cache


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of log-probabilities, relative to the largest log-probability."""
    actual, expected = actual.detach().log_softmax(-1), expected.detach().log_softmax(-1)
    return float((actual - expected).abs().max() / expected.abs().max())


def through_pickle(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def through_file(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

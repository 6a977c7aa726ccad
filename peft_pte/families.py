"""Which models PTE can be attached to, found by structure and not by class name; the rest is refused with a reason."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from .host import CACHE_NAMES, cache_argument, versions
from .rotary import find_rotation

# Projections of an attention module, by their names in transformers.
SPLIT_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED_PROJECTION = "qkv_proj"


def is_attention(module: nn.Module) -> bool:
    """An attention module knows the index of its cache layer and has projections that we know."""
    projections = all(hasattr(module, name) for name in SPLIT_PROJECTIONS) or hasattr(module, FUSED_PROJECTION)
    return hasattr(module, "layer_idx") and projections


def attention_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    """The decoder's attention modules by name, in the order of its layers."""
    return {name: module for name, module in decoder.named_modules() if is_attention(module)}


def kv_width(attention: nn.Module) -> int:
    """d_kv = kv_heads * head_dim, from the configuration: projections may be sharded, quantised or fused."""
    config = attention.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return num_heads * (head_dim or config.hidden_size // config.num_attention_heads)


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the layer list and the rotary embedding.

    Raises:
        ValueError: PTE does not support the model; the message says why.
    """

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"PTE does not support {type(model).__name__}: {reason}")

    config = getattr(model, "config", None)
    if config is None:
        refuse("it has no `config`. PTE works on decoder-only language models of the transformers library.")
    if getattr(config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder. PTE bounds the self-attention cache of decoder-only language models.")
    decoders = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "rotary_emb")
    ]
    if len(decoders) != 1:
        refuse(
            f"expected one decoder with `layers` and rotary positions (`rotary_emb`), found {len(decoders)}. Supported "
            "are Llama, Qwen2, Qwen3, Mistral, Phi-3, OLMo2, Granite, GLM-4, SmolLM3 and relatives."
        )
    decoder = decoders[0]
    if cache_argument(type(decoder).forward) is None:
        refuse(
            f"the forward of {type(decoder).__name__} takes no cache under any name that is known "
            f"({' or '.join(map(repr, CACHE_NAMES))}). Installed: {versions()}."
        )
    config = decoder.config
    attentions = list(attention_modules(decoder).values())
    if [a.layer_idx for a in attentions] != list(range(config.num_hidden_layers)):
        refuse(
            f"expected one attention module with q/k/v (or fused qkv) projections in each of its "
            f"{config.num_hidden_layers} layers, found {len(attentions)}. Multi-head latent attention (MLA), linear "
            "attention and state-space layers keep no keys and values that could be encoded."
        )
    max_length = config.max_position_embeddings
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= max_length:
        layer_types.discard("sliding_attention")
    elif window is not None and not hasattr(config, "layer_types"):
        layer_types.add("sliding_attention")
    if layer_types - {"full_attention"}:
        refuse(
            f"it has layers of type {', '.join(sorted(layer_types - {'full_attention'}))}, which bound or replace "
            "their own cache. PTE needs full attention in all layers (for Mistral, Phi-3 and the like: "
            f"`sliding_window=None`, or at least the model's length of {max_length})."
        )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        refuse("some layers use the keys and values of others, so evicted thoughts would not belong to one layer.")
    rope_type = getattr(decoder.rotary_emb, "rope_type", "default")
    if not isinstance(rope_type, str) or rope_type in ("dynamic", "longrope"):
        refuse(
            f"its rotary embedding ({rope_type}) depends on the length of each forward, so that cached keys of one "
            "sequence have several rotations, and training could not compute what decoding did."
        )
    if any(find_rotation(attention) is None for attention in attentions):
        refuse("its rotary embedding is not applied by an `apply_rotary_pos_emb`, so positions cannot be taken out.")
    return decoder

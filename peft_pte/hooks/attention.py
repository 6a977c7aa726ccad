"""The state, for one call of an attention module (H3): handed to its projections, and taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..encoder import ENCODER_NAME
from ..families import SPLIT_PROJECTIONS
from ..host import CACHE_NAMES, cache_in, versions
from ..layer import AttentionCall, Linear, current_call
from ..replay.segments import SegmentCache


def hand_over_state(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: encode what was evicted, and hand S to the projections."""
    encoder = getattr(attention, ENCODER_NAME)
    if not encoder.live_adapters:
        return
    cache = cache_in(kwargs)
    layer = layer_of(cache, attention) if cache is not None else None
    if layer is None or not hasattr(layer, "states_for"):
        raise RuntimeError(
            f"Layer {attention.layer_idx} was called without PTE's cache (got {type(cache).__name__}), so its thoughts "
            "would be lost in silence. Likely causes: the decoder's layers are called on their own instead of the "
            "model; the decoder's `forward` was replaced after the adapter was attached; a gradient checkpointing of "
            f"somebody else's drops the cache; or the model's code hands its cache on under a name other than "
            f"{' or '.join(map(repr, CACHE_NAMES))}. Installed: {versions()}."
        )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    states = layer.states_for(encoder, attention, hidden_states.shape[0])
    adapted = {name: child for name, child in attention._modules.items() if isinstance(child, Linear)}
    siblings = [adapted[name] for name in SPLIT_PROJECTIONS if name in adapted]
    call = AttentionCall(hidden_states, states, adapted.values(), siblings)
    if torch.compiler.is_compiling():
        for projection in adapted.values():
            projection.traced_call = call
    else:
        current_call.set(call)


def layer_of(cache: Cache, attention: nn.Module) -> CacheLayerMixin:
    """What the cache has for this module."""
    return cache.of(attention.layer_idx) if isinstance(cache, SegmentCache) else cache.layers[attention.layer_idx]


def take_state_back(attention: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of an attention module: nothing stays behind.

    After an error `around_decoder` sees to that: a hook that is called on errors too is known by a number of its own,
    for which `torch.compile` would compile each layer anew.
    """
    if torch.compiler.is_compiling():
        for projection in attention.children():
            if isinstance(projection, Linear):
                projection.traced_call = None
    else:
        current_call.set(None)

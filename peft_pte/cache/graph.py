"""Decoding one token as the replay of a CUDA graph: the same step, without the host's part of it.

A step of a small model is over before the host has launched its kernels one by one. So the decoder's own forward is
captured once, over slots at their full and final size, and replayed for every further token; what changes from token
to token (token, position, slot, states) stands in tensors that the graph reads (step.py). Evictions happen eagerly
before a step as ever.

The graph is kept beside the cache, for as long as that lives. An eager step and a replayed one leave the cache alike,
and may follow each other in any order. What a graph would miss drops it: other storage (rows selected, slots grown),
moved or replaced parameters, new hooks (snapshot.py). What it cannot do at all is found out when it is made: a warning
names the reason once, and decoding goes on eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..compiling import uncompiled
from .cache import PTECache
from .snapshot import Unsupported
from .step import DecodeStep

# Attention functions that compute what ours does, as far as a family passes nothing but a scaling.
EQUIVALENT = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
# Steps on unchanged storage before a graph is made: it takes as long as several steps.
EAGER_STEPS = 8


def can_replay(device: torch.device) -> bool:
    """Whether steps on this device are replayed."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Replays:
    """The captured step of a cache, once there is one."""

    def __init__(self) -> None:
        self.step: DecodeStep | None = None
        self.num_waiting = EAGER_STEPS
        self.storage: torch.Tensor | None = None
        self.has_failed = False

    def drop(self) -> None:
        """Forget the graph; another is made when storage has not changed for a while."""
        self.step, self.num_waiting, self.storage = None, EAGER_STEPS, None

    def is_due(self, cache: PTECache) -> bool:
        """Whether to make a graph now. Beam search, which selects rows at every step, never gets there."""
        storage = cache.layers[0].key_slots.data
        if storage is not self.storage:
            self.storage, self.num_waiting = storage, EAGER_STEPS
        if self.num_waiting:
            self.num_waiting -= 1
            return False
        return not self.has_failed


# By cache. Copies and pickles of a cache start without.
REPLAYS: WeakKeyDictionary[PTECache, Replays] = WeakKeyDictionary()


def is_plain_step(decoder: nn.Module, cache: PTECache, inputs: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether one token is asked for, without gradients and with nothing but its hidden state as the output."""
    ids, config = inputs.get("input_ids"), decoder.config
    return (
        ids is not None
        and ids.shape[1] == 1
        and cache.schedule is not None
        and can_replay(ids.device)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(ids.device.type)
        and not torch.compiler.is_compiling()
        and config._attn_implementation in EQUIVALENT
        and not (config.output_attentions or config.output_hidden_states)
        and all(value is None or value is False for name, value in kwargs.items() if name != "return_dict")
    )


def first_slots(mask: torch.Tensor) -> torch.Tensor | None:
    """Of each row of a mask [B, slots] the first slot in use, [B]; None if others than leading ones are masked."""
    valid = mask.bool()
    gaps = (valid[:, 1:] < valid[:, :-1]).any() | ~valid[:, -1].all()
    return None if bool(gaps) else valid.shape[1] - valid.sum(-1)


@uncompiled
def replayed_step(
    decoder: nn.Module,
    original: Callable[..., BaseModelOutputWithPast],
    cache: PTECache,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    kwargs: dict[str, Any],
) -> BaseModelOutputWithPast | None:
    """The decoder's output for one new token, or None if it has to be computed by `original`.

    Called when room was made and the token's position is noted.

    Args:
        inputs: `input_ids` [B, 1]. mask: [B, stored + 1] without evicted columns, or None. positions: [B, 1].
        kwargs: what else the decoder was called with.
    """
    if not cache.cuda_graph or not is_plain_step(decoder, cache, inputs, kwargs):
        return None
    replays = REPLAYS.setdefault(cache, Replays())
    if replays.step is not None and not replays.step.is_valid(decoder, cache):
        replays.drop()
    if replays.step is None and not replays.is_due(cache):
        return None
    first = None if mask is None else first_slots(mask)
    if mask is not None and first is None:
        return None
    ids = inputs["input_ids"]
    if replays.step is not None:
        replays.step.load(cache, ids, positions, first)
        return replays.step.replay(cache)
    try:
        step = DecodeStep(decoder, original, cache, ids)
        step.load(cache, ids, positions, first)
        step.capture()
    except Exception as error:  # whatever it is, the eager step is right, or raises it again
        replays.has_failed = True
        reason = str(error) if isinstance(error, Unsupported) else f"capturing failed with {error!r}"
        warnings.warn(
            f"PTE decodes without a CUDA graph, which is slower: {reason}. Leave `cuda_graph` off to silence this.",
            stacklevel=2,
        )
        return None
    replays.step = step
    return step.replay(cache)

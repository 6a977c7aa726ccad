"""Decoding one token as the replay of a CUDA graph: the same step, without the host's part of it.

A step of a small model is over before the host has launched its kernels one by one. So the decoder's own forward is
captured once, over slots at their full and final size, and replayed for every further token; what changes from token
to token (token, position, slot, states) stands in tensors that the graph reads. Evictions happen eagerly before a step
as ever. The captured step stores keys and values by a slot index on the device, and attends with a function of ours,
which takes the number of slots in use from there; masks are reduced to the first slot in use of each row.

The graph is kept beside the cache, for as long as that lives. An eager step and a replayed one leave the cache alike,
and may follow each other in any order. What a graph would miss drops it: other storage (rows selected, slots grown),
moved or replaced parameters, new hooks (snapshot.py). What it cannot do at all is found out when it is made: a warning
names the reason once, and decoding goes on eagerly.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from peft_pte_kernels import decode_attention

from ..compiling import uncompiled
from ..encoder import ENCODER_NAME, ThoughtEncoder
from ..families import attention_modules
from ..host import call_with_cache
from .cache import PTECache
from .snapshot import Snapshot, Unsupported, refuse_model

ATTENTION = "pte_decode"
# Attention functions that compute what ours does, as far as a family passes nothing but a scaling.
EQUIVALENT = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
# Arguments that families hand to their attention function and that say nothing new about one token.
KNOWN_ARGUMENTS = {"position_ids", "use_cache", "cache_position"}
# Steps on unchanged storage before a graph is made: it takes as long as several steps.
EAGER_STEPS = 8
WARM_UP_STEPS = 3


def can_replay(device: torch.device) -> bool:
    """Whether steps on this device are replayed."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------------------ what the captured step sees


class StepLayer(CacheLayerMixin):
    """One layer's slots at full capacity, in which the step stores one token and reads all."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.slot = keys, values, slot
        self.states: dict[str, torch.Tensor] = {}
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def states_for(self, encoder: ThoughtEncoder, attention: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
        """As `PTECacheLayer.states_for`."""
        return self.states

    def get_seq_length(self) -> NoReturn:
        raise Unsupported("the model asks its cache for the number of tokens, which changes from step to step")

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        raise Unsupported("the model makes its own attention mask")

    def get_max_length(self) -> int:
        return -1


current_step: ContextVar[DecodeStep | None] = ContextVar("pte_step", default=None)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a step, as transformers wants it: [B, H_q, 1, D] -> [B, 1, H_q, D]."""
    step = current_step.get()
    if step is None:
        raise RuntimeError(
            f"The attention implementation {ATTENTION!r} is only for PTE's captured decoding steps. One was being made "
            "in another thread on the same model; leave `cuda_graph` off there."
        )
    layer = step.layers[module.layer_idx]
    unknown = [name for name, given in kwargs.items() if given is not None and name not in KNOWN_ARGUMENTS]
    if unknown or attention_mask is not None:
        raise Unsupported(f"attention takes `{(unknown or ['attention_mask'])[0]}`")
    if dropout:
        raise Unsupported("attention dropout is active")
    if sliding_window is not None and sliding_window < layer.keys.shape[2]:
        raise Unsupported(f"attention has a window of {sliding_window} tokens")
    if key is not layer.keys or value is not layer.values or query.shape[2] != 1:
        raise Unsupported("keys and values are changed between cache and attention")
    step.attended += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query, key, value, step.first, step.length, scaling).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


# ---------------------------------------------------------------------------------------------------- the captured step


class DecodeStep:
    """The decoder's forward of one token, over the slots of one cache, with the tensors that it reads.

    On the CPU there is no graph, and the same forward is simply called.
    """

    def __init__(
        self, decoder: nn.Module, original: Callable[..., BaseModelOutputWithPast], cache: PTECache, ids: torch.Tensor
    ):
        self.decoder, self.original = decoder, original
        self.snapshot = Snapshot(decoder)
        refuse_model(decoder, self.snapshot, ids.device)
        self.is_inference = torch.is_inference_mode_enabled()
        attentions = attention_modules(decoder).values()
        self.configs = list(
            {id(config): config for config in (decoder.config, *(a.config for a in attentions))}.values()
        )
        self.encoders = [
            (attention, getattr(attention, ENCODER_NAME))
            for attention in attentions
            if hasattr(attention, ENCODER_NAME)
        ]
        self.ids = torch.zeros_like(ids)
        self.positions = torch.zeros(ids.shape, dtype=torch.long, device=ids.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=ids.device)
        self.first = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        self.length = self.slot.int()
        self.layers = [
            StepLayer(*(slots.reserve(layer.limit) for slots in (layer.key_slots, layer.value_slots)), self.slot)
            for layer in cache.layers
        ]
        self.cache = Cache(layers=self.layers)
        self.sources: list[torch.Tensor] = []  # the cache's states that were copied last
        self.num_evicted: list[int] | None = None
        self.attended = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden_states: torch.Tensor | None = None

    def is_valid(self, decoder: nn.Module, cache: PTECache) -> bool:
        """Whether a replay would do what `decoder` does with `cache` now."""
        return (
            decoder is self.decoder
            and torch.is_inference_mode_enabled() == self.is_inference
            and cache.layers[0].key_slots.length < self.layers[0].keys.shape[2]
            and all(
                own.keys is layer.key_slots.data and own.values is layer.value_slots.data
                for own, layer in zip(self.layers, cache.layers)
            )
            and self.snapshot.holds()
        )

    def load(self, cache: PTECache, ids: torch.Tensor, positions: torch.Tensor, first: torch.Tensor | None) -> None:
        """Bring everything that changes between steps into the tensors that the graph reads."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.slot.fill_(cache.layers[0].key_slots.length)
        if first is None:
            self.first.zero_()
        else:
            self.first.copy_(first)
        if cache.evicted != self.num_evicted:  # what is gone may still have to be encoded
            for attention, encoder in self.encoders:
                cache.layers[attention.layer_idx].states_for(encoder, attention, len(ids))
            self.num_evicted, self.sources = list(cache.evicted), []
        sources = [state for layer in cache.layers for state in layer.states.values()]
        if len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources)):
            return
        for own, layer in zip(self.layers, cache.layers):
            for name, state in layer.states.items():
                if name in own.states:
                    own.states[name].copy_(state)
                else:
                    own.states[name] = state.clone(memory_format=torch.contiguous_format)
        self.sources = sources

    @contextlib.contextmanager
    def _our_attention(self) -> Iterator[None]:
        before = [config._attn_implementation for config in self.configs]
        token = current_step.set(self)
        try:
            for config in self.configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            for config, implementation in zip(self.configs, before):
                config._attn_implementation = implementation
            current_step.reset(token)

    def forward(self) -> None:
        """The step itself: only kernels, no decisions of the host."""
        self.attended = 0
        self.length = (self.slot + 1).int()
        with self._our_attention():
            output = call_with_cache(
                self.decoder,
                self.original,
                self.cache,
                input_ids=self.ids,
                attention_mask=None,
                position_ids=self.positions,
                use_cache=True,
                return_dict=True,
            )
        if self.attended != len(self.layers):
            raise Unsupported("its attention modules do not use the function that the configuration names")
        self.hidden_states = output.last_hidden_state

    def capture(self) -> None:
        """Make the graph of `forward`, after steps that let libraries and kernels set themselves up.

        They compute the step that was loaded, any number of times with the same result.
        """
        if self.ids.device.type != "cuda":
            self.forward()
            return
        with torch.cuda.device(self.ids.device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        self.forward()
                # Other threads may go on using the GPU. The stream is ours, since the default one is of one device.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.forward()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
                current.wait_stream(stream)
        self.graph = graph

    def replay(self, cache: PTECache) -> BaseModelOutputWithPast:
        """Compute the step that was loaded, and note in the cache that its token is stored."""
        if self.graph is None:
            self.forward()
        else:
            self.graph.replay()
        for layer in cache.layers:
            layer.note_stored(1)
        # A copy, because the next replay writes to the same memory.
        return BaseModelOutputWithPast(last_hidden_state=self.hidden_states.clone())


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

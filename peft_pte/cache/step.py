"""The decoder's step of one token as something to capture: over static slots, with the tensors that it reads.

The step stores keys and values by a slot index on the device, and attends with a function of ours, which takes the
number of slots in use from there; masks are reduced to the first slot in use of each row. It runs on a twin of the
decoder (twin.py), so that nothing of it shows on the model. Who makes steps and replays them: graph.py.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import Enum
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from peft_pte_kernels import decode_attention

from ..encoder import ThoughtEncoder
from ..host import DecoderOutput, call_with_cache
from ..stacked import encoders_of
from . import flash
from .cache import PTECache
from .slots import SlotBuffer
from .snapshot import Snapshot, Trial, Unsupported, refuse_model, refuse_old_torch
from .twin import refuse_wrapper, twin_of

ATTENTION = "pte_decode"
# Arguments that families hand to their attention function and that say nothing new about one token.
KNOWN_ARGUMENTS = {"position_ids", "use_cache", "cache_position"}
# A step may have so many slots more than a cache needs.
SPARE_SLOTS = SlotBuffer.GROWTH
WARM_UP_STEPS = 2  # after a first one, which is watched


class Unchanged(Enum):
    """Says of an argument that it is what it was in the step before."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED
# Whole tables at once, for all layers of a cache.
keys_in, values_in, states_in = map(operator.attrgetter, ("key_slots.data", "value_slots.data", "states"))


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
            f"The attention implementation {ATTENTION!r} is only for PTE's captured decoding steps: do not set it."
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
    attention = flash.decode_attention if flash.can_attend(query, key) else decode_attention
    return attention(query, key, value, step.first, step.length, scaling).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


class DecodeStep:
    """The decoder's forward of one token, over the slots of one cache, with the tensors that it reads.

    On the CPU there is no graph, and the same forward is simply called.
    """

    def __init__(
        self,
        decoder: nn.Module,
        original: Callable[..., BaseModelOutputWithPast],
        snapshot: Snapshot,
        cache: PTECache,
        ids: torch.Tensor,
    ):
        self.snapshot = snapshot
        refuse_old_torch(ids.device)
        refuse_model(decoder, self.snapshot, ids.device)
        refuse_wrapper(decoder, original)
        self.decoder = twin_of(decoder, ATTENTION)
        self.adapters = cache.adapters
        self.is_inference = torch.is_inference_mode_enabled()
        self.encoders = encoders_of(self.decoder)
        self.ids = torch.zeros_like(ids)
        self.positions = torch.zeros(ids.shape, dtype=torch.long, device=ids.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=ids.device)
        self.first = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        self.length = self.slot.int()
        self.layers = [
            StepLayer(layer.key_slots.reserve(layer.limit), layer.value_slots.reserve(layer.limit), self.slot)
            for layer in cache.layers
        ]
        self.keys, self.values = [layer.keys for layer in self.layers], [layer.values for layer in self.layers]
        self.cache = Cache(layers=self.layers)
        self.sources: list[torch.Tensor] = []  # the cache's states that were copied last
        self.states: list[torch.Tensor] = []  # copies of them, of all layers
        self.num_evicted: list[int] | None = None
        self.slot_value: int | None = None  # what the host knows of `slot` and `first`
        self.has_first = False
        self.known_uses: list[tuple[int, int]] = []
        self.attended = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden_states: torch.Tensor  # the result, of `forward`

    @property
    def is_on_gpu(self) -> bool:
        return self.ids.device.type == "cuda"

    def serves(self, cache: PTECache) -> bool:
        """Whether the slots of `cache` are still those of the step, which may write another token into them."""
        return (
            torch.is_inference_mode_enabled() == self.is_inference
            and cache.layers[0].key_slots.length < self.layers[0].keys.shape[2]
            and all(map(operator.is_, self.keys, map(keys_in, cache.layers)))
            and all(map(operator.is_, self.values, map(values_in, cache.layers)))
        )

    def pairs(self, cache: PTECache) -> Iterator[tuple[torch.Tensor, SlotBuffer]]:
        """The step's own slots and those of a cache."""
        for own, layer in zip(self.layers, cache.layers):
            yield own.keys, layer.key_slots
            yield own.values, layer.value_slots

    def fits(self, cache: PTECache, ids: torch.Tensor) -> bool:
        """Whether the step could serve `cache`, which has slots of its own, instead of the cache it was made for.

        It may have some more slots than needed, so that prompts of about the same length can share a step.
        """

        def fit(own: torch.Tensor, slots: SlotBuffer, limit: int) -> bool:
            storage = slots.storage
            shape = [len(ids), *storage.shape[1:2], own.shape[2], *storage.shape[3:]]
            return (
                list(own.shape) == shape
                and (own.dtype, own.device) == (storage.dtype, storage.device)
                and max(limit, slots.length + 1) <= own.shape[2] <= limit + SPARE_SLOTS
            )

        return (
            (ids.shape, ids.dtype, ids.device) == (self.ids.shape, self.ids.dtype, self.ids.device)
            and torch.is_inference_mode_enabled() == self.is_inference
            and cache.adapters == self.adapters
            and len(cache.layers) == len(self.layers)
            and all(fit(own, slots, cache.layers[0].limit) for own, slots in self.pairs(cache))
        )

    def adopt(self, cache: PTECache) -> None:
        """Move the contents of a cache's slots into those of the step, for the cache to use from now on."""
        if self.is_on_gpu:
            torch.cuda.synchronize(self.ids.device)  # the cache before may have been used on another stream
        pairs = list(self.pairs(cache))
        torch._foreach_copy_(
            [own.narrow(-2, 0, slots.length) for own, slots in pairs], [slots.view for _, slots in pairs]
        )
        for own, slots in pairs:
            slots.data = own
        self.sources, self.num_evicted = [], None

    def count_uses(self) -> list[tuple[int, int]]:
        """How often each of the slots is referred to, and how many tensors there are of its storage.

        Somebody may keep a view of a cache that is gone, or its layers; then the slots cannot be another cache's.
        """
        count = getattr(torch._C, "_storage_Use_Count", lambda address: 0)
        return [(sys.getrefcount(x), count(x.untyped_storage()._cdata)) for x in (*self.keys, *self.values)]

    def note_uses(self) -> None:
        """Remember how often the slots are referred to now, but for the cache's own reference to them."""
        self.known_uses = [(references - 1, tensors) for references, tensors in self.count_uses()]

    def is_free(self) -> bool:
        """Whether nobody refers to the slots but the step."""
        return self.count_uses() == self.known_uses

    def load(
        self, cache: PTECache, ids: torch.Tensor, positions: torch.Tensor, first: torch.Tensor | None | Unchanged
    ) -> None:
        """Bring everything that changes between steps into the tensors that the graph reads.

        `first`: of each row the first slot in use, [B]; None if that is 0.
        """
        torch._foreach_copy_([self.ids, self.positions], [ids, positions])
        if self.slot_value != cache.layers[0].key_slots.length:  # the step itself moves on by one
            self.slot_value = cache.layers[0].key_slots.length
            self.slot.fill_(self.slot_value)
        if first is None:
            if self.has_first:
                self.first.zero_()
            self.has_first = False
        elif first is not UNCHANGED:
            self.first.copy_(first)
            self.has_first = True
        if cache.evicted != self.num_evicted:  # what is gone may still have to be encoded
            for attention, encoder in self.encoders:
                cache.layers[attention.layer_idx].states_for(encoder, attention, len(ids))
            self.num_evicted, self.sources = list(cache.evicted), []
        sources = list(chain.from_iterable(map(dict.values, map(states_in, cache.layers))))
        if len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources)):
            return
        if not self.states:  # the first step
            for own, layer in zip(self.layers, cache.layers):
                own.states = {
                    name: state.clone(memory_format=torch.contiguous_format) for name, state in layer.states.items()
                }
            self.states = [state for own in self.layers for state in own.states.values()]
        else:
            torch._foreach_copy_(self.states, sources)
        self.sources = sources

    def forward(self) -> None:
        """The step itself: only kernels, no decisions of the host."""
        self.attended = 0
        self.length = (self.slot + 1).int()
        token = current_step.set(self)
        try:
            output = call_with_cache(
                self.decoder,
                functools.partial(type(self.decoder).forward, self.decoder),
                self.cache,
                input_ids=self.ids,
                attention_mask=None,
                position_ids=self.positions,
                use_cache=True,
                return_dict=True,
            )
        finally:
            current_step.reset(token)
        if self.attended != len(self.layers):
            raise Unsupported("its attention modules do not use the function that the configuration names")
        self.hidden_states = output.last_hidden_state

    def step(self) -> None:
        """What is captured: the step, which moves on to the next slot at its end."""
        self.forward()
        self.slot.add_(1)

    def try_out(self) -> None:
        """Raise `Unsupported` if the step does something that cannot be captured."""
        with Trial():
            self.forward()

    def capture(self) -> None:
        """Make the graph of `forward`, after steps that let libraries and kernels set themselves up.

        They compute the step that was loaded, any number of times with the same result.
        """
        self.slot_value = None  # a capture may compute or not
        if not self.is_on_gpu:
            self.try_out()
            return
        with torch.cuda.device(self.ids.device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    self.try_out()
                    for _ in range(WARM_UP_STEPS):
                        self.forward()
                forget_workspaces()
                # Other threads may go on using the GPU. The stream is ours, since the default one is of one device.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.step()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
                current.wait_stream(stream)
                forget_workspaces()
        self.graph = graph

    def go_on(self, cache: PTECache, ids: torch.Tensor, positions: torch.Tensor) -> BaseModelOutputWithPast:
        """A step after another of the same cache, with a mask that starts where it did."""
        self.load(cache, ids, positions, UNCHANGED)
        return self.replay(cache)

    def replay(self, cache: PTECache) -> BaseModelOutputWithPast:
        """Compute the step that was loaded, and note in the cache that its token is stored."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        for layer in cache.layers:
            layer.note_stored(1)
        self.slot_value = cache.layers[0].key_slots.length
        # A copy, because the next replay writes to the same memory.
        return DecoderOutput(last_hidden_state=self.hidden_states.clone())


def forget_workspaces() -> None:
    """Let cuBLAS allocate its workspaces anew: called before a capture and after it, they are the graph's own.

    A captured matrix product has the address of the workspace of its stream built in. One that the warm-up has made
    lies in ordinary memory, and goes when somebody else frees it: another graph captured on a stream of the same pool
    that is destroyed (pytorch#193402), or Inductor, which does the same as here around its own captures. Made in the
    capture, it lies in the graph's private pool; forgotten after it, nobody else computes or frees there.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # builds without CUDA have none
    if forget is not None and torch.cuda.is_available():
        forget()

"""One segment of the replay: computed from an immutable past, so that it can be computed again in the backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache.snapshot import HARMLESS_HOOKS
from ..compiling import decides, uncompiled
from ..encoder import Evicted, ThoughtEncoder
from ..host import DecoderOutput, call_with_cache, set_cache
from ..rotary import KeyPositions
from ..stacked import StackedEncoders
from .checkpointing import layer_checkpointing_off
from .heads import SegmentHead


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned if the tensor is on a GPU, so that it is made while the GPU goes on."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


class Stored:
    """A tensor that segments read, and read again when they are recomputed; it can leave the device in between.

    What is read back is a constant of the same shape, dtype and `requires_grad`: a recomputation needs the numbers
    only, the graph is that of the first computation.
    """

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._has_left = tensor, False
        self.shape = tensor.shape
        self._device, self._requires_grad = tensor.device, tensor.requires_grad

    def load(self) -> torch.Tensor:
        if not self._has_left:
            return self._tensor
        return self._tensor.to(self._device, non_blocking=True, copy=True).requires_grad_(self._requires_grad)

    def to_host(self) -> None:
        """Free the device's copy, as far as nobody else holds it."""
        if not self._has_left:
            self._tensor, self._has_left = host_copy(self._tensor), True

    def detach(self) -> Stored:
        return Stored(self.load().detach())


class Piece(NamedTuple):
    """Keys (after RoPE) and values of neighbouring tokens in one layer, [B, H_kv, m, head_dim]."""

    keys: Stored
    values: Stored


def joined(pieces: list[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pieces that follow each other."""
    keys, values = zip(*((piece.keys.load(), piece.values.load()) for piece in pieces))
    return (torch.cat(keys, dim=-2), torch.cat(values, dim=-2)) if len(pieces) > 1 else (keys[0], values[0])


def copied(x: torch.Tensor) -> torch.Tensor:
    """[B, H_kv, m, head_dim] that lies in memory as projections give it, token by token, whatever the size of B."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(x)


class Gone(NamedTuple):
    """What leaves all layers at once: pieces by layer, positions [B, m] and validity [B, m] (None: all valid)."""

    pieces: list[list[Piece]]
    rotary_emb: nn.Module
    positions: torch.Tensor
    valid: torch.Tensor | None

    def key_positions(self) -> KeyPositions:
        """One for all layers; not kept, since it holds tables as large as the keys of a head."""
        return KeyPositions(self.rotary_emb, self.positions)

    def of_layer(self, index: int, key_positions: KeyPositions) -> Evicted:
        return Evicted(*joined(self.pieces[index]), key_positions, self.valid)

    def of_layers(self, indices: list[int]) -> list[Evicted]:
        key_positions = self.key_positions()
        return [self.of_layer(index, key_positions) for index in indices]

    def to_host(self) -> None:
        for pieces in self.pieces:
            for piece in pieces:
                piece.keys.to_host()
                piece.values.to_host()


Cores = dict[str, Stored]  # by adapter, each [B, r, r]


@dataclass
class LayerPast:
    """What one layer carries from segment to segment.

    `copies`: pieces get memory of their own. Those of the first, long segment lie like all others then, and
    `torch.compile` need not compile a layer for each mixture of both.
    """

    prefix: list[Piece] = field(default_factory=list)
    thoughts: list[Piece] = field(default_factory=list)
    cores: Cores = field(default_factory=dict)
    copies: bool = False

    @uncompiled
    def take(self, count: int) -> list[Piece]:
        """Remove and return the `count` oldest thoughts, which are whole pieces (see `add`)."""
        taken = []
        while count > 0:
            taken.append(self.thoughts.pop(0))
            count -= taken[-1].keys.shape[-2]
        return taken

    def detach(self) -> None:
        """Make cached keys and values constants (`gradient="truncated"`); the chain of states keeps its gradient."""
        for pieces in (self.prefix, self.thoughts):
            pieces[:] = [Piece(keys.detach(), values.detach()) for keys, values in pieces]

    @uncompiled
    def add(self, keys: torch.Tensor, values: torch.Tensor, start: int, prefix: int, num_evicted: int) -> None:
        """Append a segment that begins at column `start`, cut where evictions will cut it.

        The first `prefix` columns are kept for ever, then `num_evicted` at a time leave.
        """
        end = start + keys.shape[-2]
        while start < end:
            in_prefix = start < prefix
            border = prefix if in_prefix else start + num_evicted - (start - prefix) % num_evicted
            size = min(end, border) - start
            own = [x[..., :size, :] for x in (keys, values)]
            piece = Piece(*(Stored(copied(x) if self.copies else x) for x in own))
            (self.prefix if in_prefix else self.thoughts).append(piece)
            keys, values, start = keys[..., size:, :], values[..., size:, :], start + size


class SegmentLayer(CacheLayerMixin):
    """A throw-away view of the past for one segment; `update` never changes the past.

    Its cores and states are computed when the attention module asks for them, if they are not there already.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, pieces: list[Piece], cores: Cores, evicted: Callable[[], Evicted] | None, num_seen: int):
        super().__init__()
        self.pieces, self.cores, self.evicted, self.num_seen = pieces, cores, evicted, num_seen
        self.stored_length = sum(piece.keys.shape[-2] for piece in pieces)
        self.new: tuple[torch.Tensor, torch.Tensor]  # keys and values of the segment itself, by `update`
        self.new_cores: dict[str, torch.Tensor] = {}
        self.states: dict[str, torch.Tensor] = {}
        self.has_states = False
        self.following: SegmentLayer  # by SegmentCache
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = (key_states, value_states)
        return joined([*self.pieces, Piece(Stored(key_states), Stored(value_states))])

    def states_for(self, encoder: ThoughtEncoder, attention: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
        """As `PTECacheLayer.states_for`."""
        if self.has_states:
            return self.states
        cores = {name: core.load() for name, core in self.cores.items()}
        evicted = self.evicted() if self.evicted is not None else None
        self.new_cores = encoder.advance(cores, attention, evicted, batch_size)
        self.states = encoder.read_all(self.new_cores)
        return self.states

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored_length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SegmentCache(Cache):
    """The layers of one segment, which are called in order.

    An index into `layers` is a constant to `torch.compile`, so each of the model's layers would be compiled for itself,
    up to a limit, and run as it is beyond. What is compiled takes the next layer instead, whichever that is.
    """

    def __init__(self, layers: list[SegmentLayer]):
        super().__init__(layers=layers)
        end = SegmentLayer([], {}, None, 0)  # like the others, to the compiler; a ring would not be freed at once
        for layer, following in zip(layers, [*layers[1:], end]):
            layer.following = following
        self.next_layer = layers[0]

    def of(self, layer_idx: int) -> SegmentLayer:
        return self.next_layer if torch.compiler.is_compiling() else self.layers[layer_idx]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.of(layer_idx)
        self.next_layer = layer.following
        return layer.update(key_states, value_states)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].stored_length


@uncompiled
def set_states(layers: list[SegmentLayer], gone: Gone | None, stacks: list[StackedEncoders], batch_size: int) -> None:
    """Encode what is gone and read, for all layers together."""
    for layer in layers:
        layer.has_states = True
    for stack in stacks:
        here, name = [layers[index] for index in stack.indices], stack.name
        old = [layer.cores[name].load() for layer in here if name in layer.cores]
        evicted = None if gone is None else gone.of_layers(stack.indices)
        cores = stack.advance(torch.stack(old) if old else None, evicted, batch_size)
        for layer, core, state in zip(here, cores, stack.read(cores)):
            layer.new_cores[name], layer.states[name] = core, state


@dataclass
class Watch:
    """What a forward notes of itself, for logs; noted in `current_watch` while it runs."""

    evictions: torch.Tensor | None = None  # [B], how often thoughts have left, by row
    state_norms: torch.Tensor | None = None  # [layers, B], Frobenius, of the states that a row's last tokens used

    def note_states(self, layers: list[SegmentLayer], valid: torch.Tensor | None) -> None:
        """`valid` [B, q]: where the segment has tokens, None: everywhere. Rows may have ended before."""
        found = [torch.linalg.matrix_norm(s.detach()).float().cpu() for layer in layers for s in layer.states.values()]
        if not found:
            return
        norms = torch.stack(found)
        if valid is not None and self.state_norms is not None:
            norms = torch.where(valid.any(-1).cpu(), norms, self.state_norms)
        self.state_norms = norms


current_watch: ContextVar[Watch | None] = ContextVar("pte_watch", default=None)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Note what replays do inside; the latest one counts."""
    watch = Watch()
    token = current_watch.set(watch)
    try:
        yield watch
    finally:
        current_watch.reset(token)


class Result(NamedTuple):
    """What a segment gives: the decoder's output, or the head's `(logprobs, entropy)` as its `hidden_states`; the
    segment's keys and values, and the cores after it, by layer."""

    output: BaseModelOutputWithPast
    new: list[tuple[torch.Tensor, torch.Tensor]]
    cores: list[dict[str, torch.Tensor]]


@decides
def run_segment(
    decoder: nn.Module,
    forward: Callable[..., BaseModelOutputWithPast],
    head: SegmentHead | None,
    past: list[tuple[list[Piece], Cores]],
    gone: Gone | None,
    stacks: list[StackedEncoders] | None,
    num_seen: int,
    kwargs: dict[str, Any],
) -> Result:
    """Compute one segment of `num_seen` seen tokens from the past; a second call gives the same.

    `stacks`: compute the states of all layers before the first one; None: each layer does when it is called.
    """
    evicted: list[Callable[[], Evicted] | None] = [None] * len(past)
    if gone is not None and stacks is None:
        positions = gone.key_positions()
        evicted = [functools.partial(gone.of_layer, index, positions) for index in range(len(past))]
    layers = [SegmentLayer(*layer, gone_here, num_seen) for layer, gone_here in zip(past, evicted)]
    if stacks is not None:
        set_states(layers, gone, stacks, kwargs["position_ids"].shape[0])
    with layer_checkpointing_off(decoder):
        if "input_ids" in kwargs:
            kwargs = {**kwargs, "inputs_embeds": embedded(decoder, kwargs["input_ids"])}
            del kwargs["input_ids"]
        output = call_with_cache(decoder, forward, SegmentCache(layers=layers), use_cache=False, **kwargs)
    watch = current_watch.get()
    if watch is not None:
        mask, length = kwargs["attention_mask"], kwargs["position_ids"].shape[1]
        watch.note_states(layers, None if mask is None else mask[:, -length:].bool())
    set_cache(output, None)  # else the outputs would keep every segment's past alive
    if head is not None:
        hidden_states = output.last_hidden_state
        # A clone, because a slice would keep the hidden states of the whole segment alive.
        first_column = hidden_states[:, :1].clone()
        output = DecoderOutput(last_hidden_state=first_column, hidden_states=head(hidden_states))
    return Result(output, [layer.new for layer in layers], [layer.new_cores for layer in layers])


@decides
def run_checkpointed(*arguments: Any) -> Result:
    """As `run_segment`, which is called again in the backward pass.

    To its end: where a result does not matter, the second call would stop before the last modules, and ZeRO-3 needs the
    same calls in every process.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(run_segment, *arguments, use_reentrant=False)


# Hooks that gather parameters, and compute nothing.
GATHERING = ("torch.distributed.", "deepspeed.")


def sees_embeddings(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook of the embeddings may depend on, or change, what it sees."""
    module = getattr(hook, "__module__", None) or ""
    return not (module.startswith(GATHERING) or getattr(hook, "__name__", "") in HARMLESS_HOOKS)


def embedded(decoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings [B, q, D] of tokens [B, q].

    PEFT makes them require a gradient for the sake of reentrant checkpointing (`enable_input_require_grads`). As leaves
    of the graph they would stay alive, one hidden state a token. Those that are really trained are no leaves.
    """
    embeds = decoder.get_input_embeddings()(ids)
    return embeds.detach() if embeds.is_leaf else embeds


def embedded_rows(decoder: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of whole rows; as embeddings, if somebody's hook on the embeddings has to see whole rows.

    NEFTune's noise, for one, depends on the length of what it sees. Where nobody looks, each segment embeds its own
    tokens, since the embeddings of a whole row are as large as a hidden state for each token.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1] == 1:
        return inputs
    embedding = decoder.get_input_embeddings()
    hooks = (*embedding._forward_pre_hooks.values(), *embedding._forward_hooks.values())
    if not any(map(sees_embeddings, hooks)):
        return inputs
    return {"inputs_embeds": embedded(decoder, ids)}

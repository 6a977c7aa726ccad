"""The teacher-forced forward of the cache-constrained policy (Eq. 1): a whole sequence, segment by segment.

It computes what token-by-token decoding under a `PTECache` computes, with autograd through cached keys and values and
through the chain of states. `run_segment` is the one place where a segment is computed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .config import CachePolicy
from .encoder import Evicted, ThoughtEncoder
from .heads import Head, as_output, next_token_targets
from .rotary import KeyPositions
from .schedule import Schedule, stored_columns

# With checkpointing, the first segment (prompt and window) is computed in pieces of the later segments' length, so that
# the peak does not depend on it; but not in pieces shorter than this.
SHORTEST_PIECE = 128

Chunk = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, H_kv, m, head_dim] of neighbouring tokens


@dataclass
class Layout:
    """How the caller's columns are moved so that evictions come at the same column in all rows.

    Row b's column c holds the caller's column `c + offset[b]`. With `retained_prefix="prompt"` prompts are aligned at
    their ends; with an integer prefix rows are aligned at their first token.
    """

    prefix: int  # retained columns
    window: int
    offset: torch.Tensor  # [B]
    valid: torch.Tensor  # [B, T'], True where there is a token
    source: torch.Tensor | None  # [B, T'] caller's columns, None: columns stay where they are

    @classmethod
    def create(cls, valid: torch.Tensor, border: torch.Tensor | None, policy: CachePolicy) -> Layout:
        """`valid` [B, T] bool; `border` [B]: the caller's column of each row's first thought."""
        batch_size, length = valid.shape
        columns = torch.arange(length, device=valid.device)
        start = torch.where(valid, columns, length).amin(-1).clamp(max=length - 1)
        end = torch.where(valid, columns + 1, 0).amax(-1)
        if policy.retained_prefix == "prompt":
            border = torch.maximum(border, start)
            prefix = int((border - start).max())
            first_thought, offset = border, border - prefix
        else:
            prefix = policy.retained_prefix
            first_thought, offset = start + prefix, start
        window = policy.window_size
        if window == "prompt":
            window = max(1, int((valid & (columns < border[:, None])).sum(-1).max()))
        num_thoughts = int((end - first_thought).max())
        if num_thoughts <= window:  # nothing is evicted, wherever the columns are
            return cls(length, window, torch.zeros_like(start), valid, None)
        if not bool((offset == 0).all()):
            source = torch.arange(prefix + num_thoughts, device=valid.device) + offset[:, None]
            inside = (source >= 0) & (source < length)
            source = source.clamp(0, length - 1)
            return cls(prefix, window, offset, valid.gather(1, source) & inside, source)
        return cls(prefix, window, offset, valid[:, : prefix + num_thoughts], None)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] in the caller's columns -> [B, T', ...]."""
        if self.source is None:
            return x[:, : self.valid.shape[1]]
        index = self.source.view(*self.source.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def restore(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """[B, T', ...] -> [B, T, ...] in the caller's columns, zero where nothing was computed (padding)."""
        if self.source is None and x.shape[1] == length:
            return x
        index = torch.arange(length, device=x.device)[None] - self.offset[:, None]
        inside = (index >= 0) & (index < x.shape[1])
        shape = (*index.shape, *[1] * (x.ndim - 2))
        x = x.gather(1, index.clamp(0, x.shape[1] - 1).view(shape).expand(-1, -1, *x.shape[2:]))
        return x.masked_fill(~inside.view(shape), 0)


class SegmentLayer(CacheLayerMixin):
    """A throw-away view of the past for one segment; `update` never changes the past, so it can be computed again."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(
        self, chunks: tuple[Chunk, ...], cores: dict[str, torch.Tensor], evicted: Evicted | None, num_seen: int
    ):
        super().__init__()
        self.chunks, self.cores, self.evicted, self.num_seen = chunks, cores, evicted, num_seen
        self.stored_length = sum(keys.shape[-2] for keys, _ in chunks)
        self.new: Chunk | None = None
        self.new_cores = cores
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = (key_states, value_states)
        if not self.chunks:
            return self.new
        keys, values = zip(*self.chunks, self.new)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def states_for(self, encoder: ThoughtEncoder, attention: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
        """As `PTECacheLayer.states_for`."""
        self.new_cores, states = encoder.advance(self.cores, attention, self.evicted, batch_size)
        return states

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored_length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SegmentCache(Cache):
    """The layers of one segment."""

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].stored_length


@dataclass
class LayerPast:
    """What one layer carries from segment to segment: chunks of kept keys and values, and cores by adapter."""

    prefix: list[Chunk] = field(default_factory=list)
    thoughts: list[Chunk] = field(default_factory=list)
    cores: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, count: int) -> Chunk:
        """Remove and return the `count` oldest thoughts."""
        taken: list[Chunk] = []
        while count:
            keys, values = self.thoughts.pop(0)
            size = min(count, keys.shape[-2])
            taken.append((keys[..., :size, :], values[..., :size, :]))
            if size < keys.shape[-2]:
                self.thoughts.insert(0, (keys[..., size:, :], values[..., size:, :]))
            count -= size
        keys, values = zip(*taken)
        return (torch.cat(keys, dim=-2), torch.cat(values, dim=-2)) if len(taken) > 1 else taken[0]

    def detach(self) -> None:
        """Make cached keys and values constants (`gradient="truncated"`); the chain of states keeps its gradient."""
        for chunks in (self.prefix, self.thoughts):
            chunks[:] = [(keys.detach(), values.detach()) for keys, values in chunks]

    def add(self, new: Chunk, num_prefix: int) -> None:
        """Append a segment's keys and values, of which the first `num_prefix` belong to the prefix."""
        keys, values = new
        if num_prefix:
            self.prefix.append((keys[..., :num_prefix, :], values[..., :num_prefix, :]))
        if num_prefix < keys.shape[-2]:
            self.thoughts.append((keys[..., num_prefix:, :], values[..., num_prefix:, :]))


def replay(
    decoder: nn.Module,
    forward: Callable[..., BaseModelOutputWithPast],
    policy: CachePolicy,
    border: torch.Tensor | None,
    head: Head | None,
    inputs: dict[str, torch.Tensor],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder over whole sequences under the bounded cache.

    Args:
        decoder, forward: the Hugging Face decoder and its own forward.
        policy: of the active adapters.
        border: [B], the caller's column of each row's first thought; may be None for an integer prefix.
        head: turns a segment's hidden states into per-token results; None: hidden states are what is wanted.
        inputs: `{"input_ids": [B, T]}` or `{"inputs_embeds": [B, T, D]}`.
        attention_mask: [B, T] or None. position_ids: [B or 1, T] or None (then counted along the mask).

    With the model's gradient checkpointing on, each segment is computed again in the backward pass.

    Returns:
        The decoder's output in the caller's layout, without a cache.
    """
    checkpointing = checkpoints_layers(decoder) and decoder.training and torch.is_grad_enabled()
    x = next(iter(inputs.values()))
    batch_size, length = x.shape[:2]
    valid = torch.ones(batch_size, length, dtype=torch.bool, device=x.device)
    if attention_mask is not None:
        valid = attention_mask.to(x.device).bool()
    layout = Layout.create(valid, border, policy)
    schedule = Schedule.create(layout.window, policy.eviction_ratio)
    positions = layout.place(position_ids.expand(batch_size, -1))
    mask = None if bool(layout.valid.all()) else layout.valid
    targets = ()
    if head is not None:
        targets = tuple(layout.place(x) for x in next_token_targets(inputs["input_ids"], valid, border))
    inputs = {name: layout.place(tensor) for name, tensor in inputs.items()}
    past = [LayerPast() for _ in range(decoder.config.num_hidden_layers)]
    num_evicted, outputs = 0, []
    longest = max(schedule.num_evicted, SHORTEST_PIECE) if checkpointing else None
    for start, end, evict in schedule.segments(layout.prefix, layout.valid.shape[1], longest):
        evicted: list[Evicted | None] = [None] * len(past)
        if evict:
            if policy.gradient == "truncated":
                for layer in past:
                    layer.detach()
            first = layout.prefix + num_evicted
            columns = slice(first, first + schedule.num_evicted)
            key_positions = KeyPositions(decoder.rotary_emb, positions[:, columns])
            evicted_valid = None if mask is None else mask[:, columns]
            evicted = [Evicted(*layer.take(schedule.num_evicted), key_positions, evicted_valid) for layer in past]
            num_evicted += schedule.num_evicted
        segment_mask = None if mask is None else stored_columns(mask, layout.prefix, num_evicted, end).long()
        layers = [(tuple(layer.prefix + layer.thoughts), layer.cores, gone) for layer, gone in zip(past, evicted)]
        segment_kwargs = dict(
            kwargs,
            **{name: tensor[:, start:end] for name, tensor in inputs.items()},
            attention_mask=segment_mask,
            position_ids=positions[:, start:end],
        )
        segment_head = head and functools.partial(
            head, targets=targets[0][:, start:end], needed=targets[1][:, start:end]
        )
        arguments = (decoder, forward, segment_head, layers, start, segment_kwargs)
        if checkpointing:
            output, new, cores = checkpoint(run_segment, *arguments, use_reentrant=False)
        else:
            output, new, cores = run_segment(*arguments)
        outputs.append(output)
        for layer, chunk, layer_cores in zip(past, new, cores):
            layer.add(chunk, max(0, min(end, layout.prefix) - start))
            layer.cores = layer_cores
    if head is not None:
        results = (torch.cat(parts, dim=1) for parts in zip(*(output.hidden_states for output in outputs)))
        return as_output(outputs[0].last_hidden_state, *(layout.restore(x, length) for x in results))
    return join_outputs(outputs, lambda joined: layout.restore(joined, length))


def run_segment(
    decoder: nn.Module,
    forward: Callable[..., BaseModelOutputWithPast],
    head: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None,
    layers: list[tuple[tuple[Chunk, ...], dict[str, torch.Tensor], Evicted | None]],
    num_seen: int,
    kwargs: dict[str, Any],
) -> tuple[BaseModelOutputWithPast, list[Chunk], list[dict[str, torch.Tensor]]]:
    """Compute one segment from an immutable past; a second call gives the same, so it can be checkpointed."""
    cache = SegmentCache(layers=[SegmentLayer(*layer, num_seen) for layer in layers])
    with layer_checkpointing_off(decoder):
        output = forward(past_key_values=cache, use_cache=False, **kwargs)
    output.past_key_values = None  # else the outputs would keep every segment's past alive
    if head is not None:
        hidden_states = output.last_hidden_state
        # A clone, because a slice would keep the hidden states of the whole segment alive.
        first_column = hidden_states[:, :1].clone()
        output = BaseModelOutputWithPast(last_hidden_state=first_column, hidden_states=head(hidden_states))
    return output, [layer.new for layer in cache.layers], [layer.new_cores for layer in cache.layers]


def join_outputs(
    outputs: list[BaseModelOutputWithPast], restore: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> BaseModelOutputWithPast:
    """Join the outputs of segments along the sequence, without their caches.

    `restore` brings [B, T', D] back to the caller's layout.

    Raises:
        ValueError: an output was asked for that has no meaning across segments (attention maps, router logits).
    """

    def join(*parts: torch.Tensor) -> torch.Tensor:
        joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return joined if restore is None else restore(joined)

    result = {}
    for name, value in outputs[0].items():
        if name == "past_key_values":  # None, or the caller's, who adds it again
            continue
        if name == "last_hidden_state":
            result[name] = join(*(output[name] for output in outputs))
        elif name == "hidden_states":
            result[name] = tuple(map(join, *(output[name] for output in outputs)))
        elif len(outputs) == 1:
            result[name] = value
        else:
            raise ValueError(
                f"`{name}` cannot be returned: the input is longer than the window, so it is computed in "
                f"{len(outputs)} segments with different caches, and there is no single `{name}` for it. Leave "
                f"`output_{name}` out."
            )
    return type(outputs[0])(**result)


def flagged_modules(decoder: nn.Module) -> list[nn.Module]:
    """The decoder and its layers, as far as gradient checkpointing is switched on for them."""
    return [module for module in (decoder, *decoder.layers) if getattr(module, "gradient_checkpointing", False)]


def checkpoints_layers(decoder: nn.Module) -> bool:
    """Whether gradient checkpointing was switched on for the model.

    Raises:
        ValueError: it was switched on in its reentrant form.
    """
    flagged = flagged_modules(decoder)
    for module in flagged:
        if getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "PTE does not support reentrant gradient checkpointing: it would lose the gradients through cached "
                "keys, values and states. Use `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
    return bool(flagged)


@contextlib.contextmanager
def layer_checkpointing_off(decoder: nn.Module) -> Iterator[None]:
    """Switch the layers' own checkpointing off for a call, also for one that is repeated in the backward pass.

    A checkpointed layer drops its cache, and with it the thoughts. The replay checkpoints whole segments instead.
    """
    flagged = flagged_modules(decoder)
    for module in flagged:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True

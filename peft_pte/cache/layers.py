"""One layer's share of a `PTECache`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from ..encoder import Evicted, ThoughtEncoder
from .slots import SlotBuffer


class PTECacheLayer(CacheLayerMixin):
    """One layer's share: keys, values, and by adapter the core and the state read from it."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        self.reset()  # and not the base class's, which would set `keys` and `values`: they are properties here

    def reset(self) -> None:
        self.is_initialized = False
        self.key_slots, self.value_slots = SlotBuffer(), SlotBuffer()
        self.limit = 0
        self.cumulative_length = 0
        self.evicted: Evicted | None = None  # has left, but is not encoded yet
        self.cores: dict[str, torch.Tensor] = {}
        self.states: dict[str, torch.Tensor] = {}

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys in use, [B, H_kv, stored, head_dim]."""
        return None if self.key_slots.data is None else self.key_slots.view

    @property
    def values(self) -> torch.Tensor | None:
        """Values in use, as `keys`."""
        return None if self.value_slots.data is None else self.value_slots.view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [B, H_kv, q, head_dim]; returns all that is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self.key_slots.append(key_states, self.limit)
        values = self.value_slots.append(value_states, self.limit)
        self.cumulative_length += key_states.shape[-2]
        return keys, values

    def note_stored(self, count: int) -> None:
        """Keys and values of `count` tokens were written behind the slots in use (see graph.py)."""
        self.key_slots.length += count
        self.value_slots.length += count
        self.cumulative_length += count

    def states_for(self, encoder: ThoughtEncoder, attention: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
        """The states to use in this step. What was evicted before the step is encoded first.

        Called inside the attention module's forward, where FSDP and ZeRO-3 have the parameters gathered.
        """
        missing = any(name not in self.states for name in encoder.live_adapters)
        if self.evicted is not None or missing or torch.is_grad_enabled() or encoder.in_step:
            self.cores = encoder.advance(self.cores, attention, self.evicted, batch_size)
            self.states = encoder.read_all(self.cores)
            self.evicted = None
        return self.states

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: positions and `generate` count with it."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.key_slots.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            refuse_rollback()

    def activate_past_recording(self) -> None:
        refuse_rollback()

    def offload(self) -> NoReturn:
        raise ValueError(
            "PTECache cannot be offloaded: it is small and constant in size; use it on the model's device."
        )

    def select(self, index: torch.Tensor) -> None:
        """Select rows of the batch, in keys, values, cores and states alike."""
        if not self.is_initialized:
            return
        self.key_slots.select(index)
        self.value_slots.select(index)
        for by_adapter in (self.cores, self.states):
            for name, tensor in by_adapter.items():
                by_adapter[name] = tensor.index_select(0, index.to(tensor.device))

    @property
    def nbytes(self) -> int:
        held = [*self.cores.values(), *self.states.values()]
        return self.key_slots.nbytes + self.value_slots.nbytes + sum(t.numel() * t.element_size() for t in held)


def refuse_rollback() -> NoReturn:
    raise ValueError(
        "PTECache cannot be rolled back: evicted thoughts are gone and their encoding cannot be undone. Assisted, "
        "speculative and prompt-lookup decoding need a rollback; generate without `assistant_model`, "
        "`prompt_lookup_num_tokens` and the like."
    )

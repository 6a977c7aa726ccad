"""Who evicts: thoughts leave the cache in all layers at once, and are encoded in a few launches for the whole model."""

from __future__ import annotations

import torch
from torch import nn

import peft_pte_kernels
from peft_pte_kernels import dispatch

from ..compiling import uncompiled
from ..encoder import Evicted, full_precision, write_layers
from ..rotary import KeyPositions
from ..stacked import Layers, StackedEncoders, encoders_of, grouped
from .cache import PTECache


@uncompiled
def evict(cache: PTECache, mask: torch.Tensor | None, decoder: nn.Module) -> None:
    """Let the oldest thoughts of all rows that are full leave.

    They are encoded here, for all layers at once and out of the slots themselves, where kernels can do that; else
    the layers encode a copy in the coming step.
    """
    if cache.schedule is None:
        return
    full = [cache.schedule.is_full(cache.num_thoughts(row)) for row in range(len(cache.lead))]
    if not any(full):
        return
    n = cache.schedule.num_evicted
    if cache.in_lockstep:
        start = cache.lead[0] + cache.prefix[0]
        column = cache.padding[0] + cache.prefix[0] + cache.evicted[0]
        valid = None if mask is None else mask[:, column : column + n].bool()
        valid = None if valid is None or bool(valid.all()) else valid
        positions = KeyPositions(decoder.rotary_emb, cache.positions.take(start, n)[:, 0, :, 0])
        if not evict_at_once(cache, decoder, start, n, positions, valid):
            for layer in cache.layers:
                gone = layer.key_slots.take(start, n), layer.value_slots.take(start, n)
                layer.evicted = Evicted(*gone, positions, valid)
        cache.evicted = [evicted + n for evicted in cache.evicted]
        return
    # Rows are full at different times. A row that evicts moves its prefix up and gets empty slots in front; slots
    # that are empty in all rows are given back.
    taken, kept, lead = [], [], []
    for row, is_full in enumerate(full):
        first = cache.lead[row] + cache.prefix[row]
        slots = list(range(cache.stored_length))
        taken.append(slots[first : first + n] if is_full else [0] * n)
        kept.append([0] * n + slots[:first] + slots[first + n :] if is_full else slots)
        lead.append(cache.lead[row] + n * is_full)
    column_mask = cache.compact_mask(mask, 0)
    drop = min(lead)
    taken_index, kept_index = torch.tensor(taken), torch.tensor(kept)[:, drop:]
    valid = torch.tensor(full)[:, None].expand(-1, n).to(column_mask.device)
    valid = valid & column_mask.bool().gather(1, taken_index.to(column_mask.device))
    positions = KeyPositions(decoder.rotary_emb, cache.positions.take_rows(taken_index, kept_index)[:, 0, :, 0])
    for layer in cache.layers:
        gone = (slots.take_rows(taken_index, kept_index) for slots in (layer.key_slots, layer.value_slots))
        layer.evicted = Evicted(*gone, positions, valid)
    cache.lead = [length - drop for length in lead]
    cache.evicted = [evicted + n * is_full for evicted, is_full in zip(cache.evicted, full)]


def evict_at_once(
    cache: PTECache,
    decoder: nn.Module,
    start: int,
    count: int,
    positions: KeyPositions,
    valid: torch.Tensor | None,
) -> bool:
    """Encode `count` slots from `start` on in every layer, and close the gap; False if nothing was done.

    Not with gradients, which need a copy of what leaves, nor with layers on several devices or sharded weights: then
    the layers encode a copy, each in its own forward.

    Args:
        positions: of what leaves; already taken out of the cache's own. valid: [B, count], False: no token; or None.
    """
    slots = [buffer for layer in cache.layers for buffer in (layer.key_slots, layer.value_slots)]
    if torch.is_grad_enabled() or any(buffer.must_copy() for buffer in slots):
        return False
    if len({buffer.data.device for buffer in slots}) > 1 or not dispatch.uses_triton(slots[0].data):
        return False
    layers, groups = encoders_of(decoder), []
    for name in cache.adapters:
        for group in grouped(name, layers):
            for attention, encoder in group:
                layer = cache.layers[attention.layer_idx]
                ready = layer.evicted is None and name in layer.cores
                if not ready or not encoder.is_fused(name, layer.key_slots.data):
                    return False
            groups.append((name, group))
    for name, group in groups:
        encode_group(cache, name, group, start, count, positions, valid)
    peft_pte_kernels.compact([buffer.data for buffer in slots], start, count, cache.stored_length + count)
    for buffer in slots:
        buffer.length -= count
    return True


def encode_group(
    cache: PTECache,
    name: str,
    group: Layers,
    start: int,
    count: int,
    positions: KeyPositions,
    valid: torch.Tensor | None,
) -> None:
    """Encode and read for layers that share a rule and a rotation.

    Q and S_0 are computed anew, in a few launches for all layers: parameters may have changed since the last eviction.
    """
    layers = [cache.layers[attention.layer_idx] for attention, _ in group]
    gone = [
        Evicted(
            *(slots.view.narrow(-2, start, count) for slots in (layer.key_slots, layer.value_slots)), positions, valid
        )
        for layer in layers
    ]
    stack = StackedEncoders.create(name, group)
    cores = torch.stack([layer.cores[name] for layer in layers])
    if stack.rule.update != "none":
        with full_precision():
            cores = write_layers(name, cores, group, gone, stack.reading.query)
    for layer, core, state in zip(layers, cores, stack.read(cores)):
        layer.cores[name], layer.states[name] = core, state

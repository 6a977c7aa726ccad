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
    schedule = cache.schedule
    if schedule is None or cache.room() > 0:
        return
    if cache.in_lockstep and cache.is_whole(mask):
        evict_together(cache, decoder, cache.prefix, schedule.num_evicted)
        return
    tally = cache.tally(mask, schedule)
    start = tally.common_start()
    if start is not None:
        cache.columns.take(start, tally.num_evicted)
        cache.columns_left = tally.columns
        evict_together(cache, decoder, start, tally.num_evicted)
        return
    if any(tally.full):
        index = tally.leaving()
        positions = KeyPositions(decoder.rotary_emb, cache.positions.gather(index)[:, 0, :, 0])
        valid = None if all(tally.full) else tally.is_full[:, None].expand(-1, tally.num_evicted)
        for layer in cache.layers:
            keys, values = layer.key_slots.gather(index), layer.value_slots.gather(index)
            layer.evicted = Evicted(keys, values, positions, valid)
    cache.close_gaps(tally)


def evict_together(cache: PTECache, decoder: nn.Module, start: int, n: int) -> None:
    """Evict `n` slots from `start` on, in all rows."""
    positions = KeyPositions(decoder.rotary_emb, cache.positions.take(start, n)[:, 0, :, 0])
    if not evict_at_once(cache, decoder, start, n, positions):
        for layer in cache.layers:
            keys, values = layer.key_slots.take(start, n), layer.value_slots.take(start, n)
            layer.evicted = Evicted(keys, values, positions, None)
    cache.evicted = [evicted + n for evicted in cache.evicted]


def evict_at_once(cache: PTECache, decoder: nn.Module, start: int, count: int, positions: KeyPositions) -> bool:
    """Encode `count` slots from `start` on in every layer, and close the gap; False if nothing was done.

    Not with gradients, which need a copy of what leaves, nor with layers on several devices or sharded weights: then
    the layers encode a copy, each in its own forward.

    `positions`: of what leaves, in which every slot holds a token; already taken out of the cache's own.
    """
    slots = cache.slots()
    if torch.is_grad_enabled() or any(buffer.must_copy() for buffer in slots):
        return False
    if len({buffer.storage.device for buffer in slots}) > 1 or not dispatch.uses_triton(slots[0].storage):
        return False
    layers, groups = encoders_of(decoder), []
    for name in cache.adapters:
        for group in grouped(name, layers):
            for attention, encoder in group:
                layer = cache.layers[attention.layer_idx]
                ready = layer.evicted is None and name in layer.cores
                if not ready or not encoder.is_fused(name, layer.key_slots.storage):
                    return False
            groups.append((name, group))
    for name, group in groups:
        encode_group(cache, name, group, start, count, positions)
    peft_pte_kernels.compact([buffer.storage for buffer in slots], start, count, cache.stored_length + count)
    for buffer in slots:
        buffer.length -= count
    return True


def encode_group(cache: PTECache, name: str, group: Layers, start: int, count: int, positions: KeyPositions) -> None:
    """Encode and read for layers that share a rule and a rotation.

    Q and S_0 are computed anew, in a few launches for all layers: parameters may have changed since the last eviction.
    """
    layers = [cache.layers[attention.layer_idx] for attention, _ in group]
    gone = [
        Evicted(
            layer.key_slots.view.narrow(-2, start, count),
            layer.value_slots.view.narrow(-2, start, count),
            positions,
            None,
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

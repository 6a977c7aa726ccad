"""Decoding one token as the replay of a CUDA graph: the same step, without the host's part of it.

A step of a small model is over before the host has launched its kernels one by one. So the decoder's own forward is
captured once, over slots at their full and final size, and replayed for every further token; what changes from token
to token (token, position, slot, states) stands in tensors that the graph reads (step.py). Evictions happen eagerly
before a step as ever.

A step is kept beside the model, and lent to a cache for as long as that lives: the cache then uses the slots that the
graph reads. The next cache of the same shape has it without waiting. An eager step and a replayed one leave the cache
alike, and may follow each other in any order. What a graph would miss drops it: other storage (rows selected, slots
grown), moved or replaced parameters, new hooks (snapshot.py). What it cannot do at all is found out when it is made: a
warning names the reason once for a model, and decoding goes on eagerly.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..compiling import uncompiled
from .cache import PTECache
from .snapshot import Snapshot, Unsupported
from .step import DecodeStep

# Attention functions that compute what ours does, as far as a family passes nothing but a scaling.
EQUIVALENT = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
# Steps on unchanged storage before a graph is made: it takes as long as several steps.
EAGER_STEPS = 8
# Steps that wait for another cache. Each holds slots for a whole cache: with one, nothing is held that was not in use
# a moment ago, and `generate` after `generate` of one shape has its graph at once.
MAX_IDLE = 1


def can_replay(device: torch.device) -> bool:
    """Whether steps on this device are replayed."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Failure(NamedTuple):
    """A step that could not be made: of which model, and for how many rows and slots. Smaller ones may be possible."""

    snapshot: Snapshot
    rows: int
    slots: int


class Steps:
    """The captured steps of a decoder, lent to caches or idle.

    Kept with the decoder (`pte_attachment.steps`), which nothing in here refers to: with it all of them go at once.
    Copies and pickles of a model start without.
    """

    def __init__(self) -> None:
        self.lent: set[DecodeStep] = set()
        self.idle: deque[DecodeStep] = deque(maxlen=MAX_IDLE)  # threads may share it: only single operations are used
        self.failure: Failure | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return Steps()

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        return Steps, ()

    def borrow(self, cache: PTECache, ids: torch.Tensor) -> DecodeStep | None:
        """An idle step that fits `cache`, which has its slots from now on."""
        for step in tuple(self.idle):
            if not step.fits(cache, ids):
                continue
            with contextlib.suppress(ValueError):  # another thread has it
                self.idle.remove(step)
                if step.is_free() and step.snapshot.holds_in_detail():
                    step.adopt(cache)
                    self.lent.add(step)
                    return step
        return None

    def make(
        self,
        decoder: nn.Module,
        original: Callable[..., BaseModelOutputWithPast],
        cache: PTECache,
        ids: torch.Tensor,
        positions: torch.Tensor,
        first: torch.Tensor | None,
    ) -> DecodeStep | None:
        """A new step for `cache`; None, after a warning, if there can be none."""
        rows, slots, failure = len(ids), cache.layers[0].limit, self.failure
        if failure is not None and rows >= failure.rows and slots >= failure.slots:
            if failure.snapshot.holds_in_detail():
                return None
            self.failure = None
        snapshot = None
        try:
            snapshot = Snapshot(decoder)
            step = DecodeStep(decoder, original, snapshot, cache, ids)
            step.load(cache, ids, positions, first)
            step.capture()
        except Exception as error:  # whatever it is, the eager step is right, or raises it again
            if snapshot is not None:
                self.failure = Failure(snapshot, rows, slots)
            reason = str(error) if isinstance(error, Unsupported) else f"capturing failed with {error!r}"
            warnings.warn(
                f"PTE decodes without a CUDA graph, which is slower: {reason}. Leave `cuda_graph` off to silence this.",
                stacklevel=3,
            )
            return None
        step.note_uses()
        self.lent.add(step)
        return step


def take_back(steps_reference: weakref.ref[Steps], step_reference: weakref.ref[DecodeStep]) -> None:
    """A cache does not need its step any more."""
    steps, step = steps_reference(), step_reference()
    if steps is not None and step is not None and step in steps.lent:
        steps.lent.discard(step)
        steps.idle.append(step)


class Replays:
    """What a cache knows of its captured step, once there is one; the step belongs to the model."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.reference: Callable[[], DecodeStep | None] = lambda: None
        self.num_waiting = EAGER_STEPS
        self.storage: Callable[[], torch.Tensor | None] = lambda: None
        self.has_failed = False
        self.checked: tuple[Any, ...] | None = None  # the situation that was found to be right

    @property
    def step(self) -> DecodeStep | None:
        """None also when the model is gone."""
        return self.reference()

    def keep(self, cache: PTECache, steps: Steps, step: DecodeStep) -> None:
        """Use a step until it is dropped or the cache dies."""
        self.steps, self.reference = weakref.ref(steps), weakref.ref(step)
        self.give_back = weakref.finalize(cache, take_back, self.steps, self.reference)
        self.give_back.atexit = False

    def drop(self, cache: PTECache) -> None:
        """Forget the step. Another is borrowed, or made when storage has not changed for a while."""
        step, steps = self.step, self.steps()
        if steps is not None and step is not None:
            is_in_use = any(own is slots.data for own, slots in step.pairs(cache))
            if is_in_use or not step.snapshot.holds():
                steps.lent.discard(step)
        self.give_back()
        self.clear()

    def is_due(self, cache: PTECache) -> bool:
        """Whether to make a graph now. Beam search, which selects rows at every step, never gets there."""
        storage = cache.layers[0].key_slots.data
        if storage is not self.storage():
            self.storage, self.num_waiting = weakref.ref(storage), EAGER_STEPS
        if self.num_waiting:
            self.num_waiting -= 1
            return False
        return not self.has_failed


# By cache. Copies and pickles of a cache start without.
REPLAYS: weakref.WeakKeyDictionary[PTECache, Replays] = weakref.WeakKeyDictionary()


def is_plain_step(decoder: nn.Module, cache: PTECache, inputs: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether one token is asked for, without gradients and with nothing but its hidden state as the output."""
    ids, config = inputs.get("input_ids"), decoder.config
    return (
        ids is not None
        and ids.shape[1] == 1
        and cache.schedule is not None
        and cache.layers[0].is_initialized
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
def ready_step(
    decoder: nn.Module,
    cache: PTECache,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    call: object | None,
) -> DecodeStep | None:
    """The step of a cache if only the token is new since the last one, so that neither mask nor model need a look.

    That is between evictions, inside of one `generate` call: looking at a mask waits for the device, and there are
    thousands of tensors that might have moved. Arguments as in `replayed_step`, with the whole mask; called before the
    token's position is noted.
    """
    replays = REPLAYS.get(cache) if call is not None and cache.cuda_graph else None
    step = None if replays is None else replays.step
    if (
        replays is None
        or step is None
        or replays.checked != situation(cache, mask, call)
        or not is_plain_step(decoder, cache, inputs, kwargs)
        or not (step.snapshot.of() is decoder and step.serves(cache) and step.snapshot.seems_to_hold())
    ):
        return None
    return step


def situation(cache: PTECache, mask: torch.Tensor | None, call: object | None) -> tuple[Any, ...] | None:
    """What decides about a mask, and whether the model may have changed: as long as it is equal, neither has."""
    return None if call is None else (call, mask is None, list(cache.evicted), list(cache.lead))


@uncompiled
def replayed_step(
    decoder: nn.Module,
    original: Callable[..., BaseModelOutputWithPast],
    cache: PTECache,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    kwargs: dict[str, Any],
    call: object | None,
) -> BaseModelOutputWithPast | None:
    """The decoder's output for one new token, or None if it has to be computed by `original`.

    Called when room was made and the token's position is noted.

    Args:
        inputs: `input_ids` [B, 1]. mask: [B, stored + 1] without evicted columns, or None. positions: [B, 1].
        kwargs: what else the decoder was called with. call: stands for the `generate` call, None outside of any.
    """
    if not cache.cuda_graph or not is_plain_step(decoder, cache, inputs, kwargs):
        return None
    replays, steps = REPLAYS.setdefault(cache, Replays()), decoder.pte_attachment.steps
    ids, step = inputs["input_ids"], replays.step
    if step is not None and not (step.snapshot.of() is decoder and step.serves(cache) and step.snapshot.holds()):
        replays.drop(cache)
        step = None
    if step is None:
        step = steps.borrow(cache, ids)
        if step is not None:
            replays.keep(cache, steps, step)
        elif not replays.is_due(cache):
            return None
    first = None if mask is None else first_slots(mask)
    if mask is not None and first is None:
        return None
    if step is None:
        step = steps.make(decoder, original, cache, ids, positions, first)
        if step is None:
            replays.has_failed = True
            return None
        replays.keep(cache, steps, step)
    step.load(cache, ids, positions, first)
    replays.checked = situation(cache, mask, call)
    return step.replay(cache)

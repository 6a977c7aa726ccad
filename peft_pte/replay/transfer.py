"""Attention transfer: each layer learns alone what its attention would have said of the thoughts that have left.

The base model runs once, with its full cache; what goes into every attention module and what comes out is recorded.
Then each adapted layer computes its attention under the window, with its states, from the recorded input, and is
compared with the recorded output. Nothing else runs and nothing is propagated through other layers: a step costs a part
of a forward, and a layer has a target of its own for every token. So linear attention has been made of softmax
attention (LoLCATs, Zhang et al. 2024, arXiv 2410.10254); here it is made of what the window leaves out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..compiling import layers_uncompiled
from ..encoder import ENCODER_NAME, state_dtype
from ..host import cache_in
from ..layer import is_sharded_tensor
from . import segments
from .chunks import Results
from .distillation import base_in_front, compared_columns, waits_on_host
from .heads import SegmentHead, Task, asked, at_tokens, attachment_in, divided, packed
from .layout import gathered

Forward = Callable[..., BaseModelOutputWithPast]


def adapted_attentions(decoder: nn.Module) -> dict[int, nn.Module]:
    """By layer, the attention modules that have an active adapter, also if adapters are switched off."""
    found = {}
    for index, layer in enumerate(decoder.layers):
        for module in layer.children():
            encoder = getattr(module, ENCODER_NAME, None)
            if encoder is not None and any(map(encoder.has_adapter, encoder.active_adapters)):
                found[index] = module
    return found


@contextlib.contextmanager
def forwards_replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules call these instead of their own forward, in this call of the model."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


class LayersAlone:
    """In one segment, in place of the decoder's layers: attention modules on their recorded inputs.

    `record`: [B, q, layers, 2, D] of the segment; `scales`: [layers], by which mean squares are divided.
    """

    def __init__(self, decoder: nn.Module, record: torch.Tensor, needed: torch.Tensor, scales: torch.Tensor):
        self.decoder, self.record, self.needed, self.scales = decoder, record, needed, scales
        self.attentions = adapted_attentions(decoder)
        self.errors: list[torch.Tensor] = []

    def forward(self, original: Forward, **kwargs: Any) -> BaseModelOutputWithPast:
        """The decoder's forward, whose layers do nothing but note errors; again in a recomputation."""
        self.errors = []
        forwards: dict[nn.Module, Callable[..., Any]] = {
            layer: functools.partial(self.pass_by, index) for index, layer in enumerate(self.decoder.layers)
        }
        for place, (index, attention) in enumerate(self.attentions.items()):
            layer = self.decoder.layers[index]
            forwards[layer] = functools.partial(self.attend, layer, attention, place)
        with layers_uncompiled(self.decoder), forwards_replaced(forwards):
            return original(**kwargs)

    def attend(
        self,
        layer: nn.Module,
        attention: nn.Module,
        place: int,
        hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A layer's forward: its attention, with the arguments that the layer hands on."""
        names = list(inspect.signature(type(layer).forward).parameters)[2:]
        given, wanted = (x.to(hidden_states) for x in self.record[:, :, place].unbind(2))
        found = attention(hidden_states=packed(given), **dict(zip(names, args)), **kwargs)[0]
        dtype = state_dtype(found)
        squares = (found.to(dtype) - wanted.to(dtype)).square().mean(-1)
        self.errors.append(squares / self.scales[place].to(squares))
        return hidden_states

    def pass_by(self, index: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of a layer that is not adapted; the replay wants keys and values, which nobody reads."""
        cache = cache_in(kwargs)
        if cache is None:
            raise RuntimeError(f"Layer {index} was called without the cache of the replay.")
        nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        cache.update(nothing, nothing, index)
        return hidden_states

    def head(self, hidden_states: torch.Tensor) -> Results:
        """The mean error of the layers, [B, q], with a gradient and without."""
        error = torch.stack(self.errors).mean(0).masked_fill(~self.needed, 0)
        self.errors = []
        return error, error.detach()


@dataclass(frozen=True)
class TransferHead:
    """Errors of attention modules alone, from the record [B, T, layers, 2, D]; `needed` [B, T]."""

    record: torch.Tensor
    needed: torch.Tensor
    scales: torch.Tensor
    bounds_base: ClassVar[bool] = True

    def task(self, top: nn.Module, ids: torch.Tensor, valid: torch.Tensor, border: torch.Tensor | None) -> Task:
        return Task(self, self.record, self.needed)

    def alone(
        self, decoder: nn.Module, forward: Forward, targets: torch.Tensor, needed: torch.Tensor
    ) -> tuple[Forward, SegmentHead]:
        """A segment's forward and head."""
        layers = LayersAlone(decoder, targets, needed, self.scales)
        return functools.partial(layers.forward, forward), layers.head

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Results:
        raise RuntimeError("Attention transfer is computed segment by segment: the model has no active PTE adapter.")


def record_attention(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What goes into the adapted attention modules of the base model with its full cache, and what comes out.

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP) or not. No other thread may use it meanwhile.
        input_ids: [B, T]. attention_mask: [B, T], 1 for tokens; None: all are tokens.

    Returns:
        [B, T, adapted layers, 2, D] in the model's dtype, without gradients; on padding it means nothing. Large:
        4 D bytes for each token and layer in half precision. With `gradient="truncated"` or `offload=True` it is in
        host memory, where each layer's part goes as soon as it is there.

    Raises:
        ValueError: the model has no PTE adapter.
    """
    attentions = adapted_attentions(attachment_in(model).decoder)
    if not attentions:
        raise ValueError("`model` has no active PTE adapter: choose one with `set_adapter`.")
    recording = Recording(len(attentions), waits_on_host(model))
    handles = [
        attention.register_forward_hook(functools.partial(recording.note, place), with_kwargs=True)
        for place, attention in enumerate(attentions.values())
    ]
    try:
        _, order = base_in_front(model, input_ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return recording.finished(order)


class Recording:
    """What `record_attention` gives, filled as modules run: nothing is held twice, not even while it is made."""

    parts: torch.Tensor  # [layers, 2, B, T, D]: a module's input or output is one piece of memory

    def __init__(self, num_layers: int, on_host: bool):
        self.num_layers, self.on_host = num_layers, on_host

    def note(self, place: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the module at `place` among those that are adapted."""
        pair = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), output[0]
        if not hasattr(self, "parts"):
            dtype = torch.promote_types(pair[0].dtype, pair[1].dtype)  # they differ under autocast
            device = torch.device("cpu") if self.on_host else pair[0].device
            pinned = self.on_host and pair[0].is_cuda
            shape = self.num_layers, 2, *pair[0].shape
            self.parts = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        for part, values in zip(self.parts[place], pair):
            part.copy_(values)

    def finished(self, order: torch.Tensor | None) -> torch.Tensor:
        """The record [B, T, layers, 2, D], tokens where they were before they were put in `order`."""
        if order is not None:
            columns = order.argsort(dim=1)
            for part in self.parts.flatten(0, 1):
                part.copy_(gathered(part, columns))
        return self.parts.permute(2, 3, 0, 1, 4)


def mean_squares(outputs: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
    """Of each layer's outputs [B, T, layers, D], over the tokens that are compared [B, T] (bool): [layers]."""
    dtype, count = state_dtype(outputs), compared.sum().clamp(min=1)
    # Layer by layer, since a copy in float32 of all of them would be twice as large as the record, and may not fit the
    # device at all.
    layers = (of_layer.to(compared.device).to(dtype) for of_layer in outputs.unbind(2))
    sums = [(of_layer.square().mean(-1) * compared).sum() for of_layer in layers]
    return (torch.stack(sums) / count).clamp(min=torch.finfo(dtype).tiny)


def attention_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_lengths: Any = None,
    only_after_eviction: bool = True,
    record: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """How far each adapted layer's attention under the window is from that of the base with its full cache.

    The mean, over adapted layers and tokens, of |y - y_base|^2 by the mean |y_base|^2 of the layer in this batch: y is
    what the attention module gives under the bounded cache (Eq. 1) with its states, for the input that the base model
    gives it; zero is a perfect memory. Layers learn at the same time and independently of each other.

    It needs neither labels nor rewards, and no backward pass through the model. A step costs the base's forward once
    for each batch (`record`, which several steps may share), and the attention modules forward and backward: a small
    part of what `distillation_loss` costs. What it does not see is that layers of the student get inputs that other
    layers have changed; so it is a start, before `distillation_loss`, labels or GRPO.

    With the adapter off (`with model.disable_adapter():`) it is the error of the base model under the adapter's window.

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP) or not. No other thread may use it meanwhile.
        input_ids: [B, T], in any layout. attention_mask: [B, T], 1 for tokens; None: all are tokens.
        prompt_lengths: [B] or int, as of `distillation_loss`.
        only_after_eviction: compare only tokens that are computed when thoughts have left.
        record: `record_attention(model, input_ids, attention_mask)`, if that is there already.
        num_items_in_batch: the sum over tokens is divided by it; None: by the number of tokens that are compared.

    Returns:
        The loss, a scalar in float32 (float64 in float64 models); zero, with zero gradients, where nothing is compared.

    Raises:
        ValueError: the model has no PTE adapter, its parameters are sharded (FSDP, ZeRO-3), `record` has another shape,
            the prompts are not known, or as the model's forward.
    """
    decoder = attachment_in(model).decoder
    if any(map(is_sharded_tensor, decoder.parameters())):
        raise ValueError(
            "`attention_loss` runs attention modules alone, but the model's parameters are sharded (FSDP, ZeRO-3), and "
            "gathered only when whole layers run. Use DDP or one process, or `distillation_loss`."
        )
    needed = compared_columns(model, input_ids, attention_mask, prompt_lengths, only_after_eviction)
    if record is None:
        record = record_attention(model, input_ids, attention_mask)
    expected = (*input_ids.shape, len(adapted_attentions(decoder)), 2)
    if record.ndim != 5 or record.shape[:4] != expected:
        raise ValueError(
            f"`record` has shape {tuple(record.shape)}, but must be {[*expected, 'hidden size']}: what "
            "`record_attention` gives for the same batch and adapter."
        )
    scales = mean_squares(record[..., 1, :], needed)
    if torch.is_grad_enabled() and record.device.type != "cpu" and waits_on_host(model):
        record = segments.host_copy(record)
    values, _ = asked(model, TransferHead(record, needed, scales), input_ids, attention_mask, prompt_lengths)
    valid = torch.ones_like(needed) if attention_mask is None else attention_mask.to(needed.device).bool()
    return divided(values.sum(), at_tokens(needed, valid), num_items_in_batch)

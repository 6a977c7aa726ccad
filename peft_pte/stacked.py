"""The thought encoders of all layers together: what takes launches for each layer takes as many for the whole model.

Q and S_0 follow from parameters only, so that they are computed once for everything that reads them, and all layers
let go of the same tokens at once. Not where parameters are there only while their module is called (FSDP, ZeRO-3):
there each layer encodes and reads inside its attention module's forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .compiling import uncompiled
from .encoder import (
    ENCODER_NAME,
    Evicted,
    Reading,
    StateLinear,
    StateRule,
    ThoughtEncoder,
    TokenTable,
    full_precision,
    read_layers,
    reading_of,
    start_of,
    state_dtype,
    write_layers,
)
from .layer import device_of, is_gathered

Layers = list[tuple[nn.Module, ThoughtEncoder]]  # attention modules with their encoders


def encoders_of(decoder: nn.Module) -> Layers:
    """The encoders with their attention modules, in the order of the layers.

    Not by a walk over all modules, which takes longer than what an eviction launches.
    """
    found = []
    for layer in decoder.layers:
        here = [module for module in layer.children() if ENCODER_NAME in module._modules]
        here = here or [module for module in layer.modules() if ENCODER_NAME in module._modules]
        found += [(module, module._modules[ENCODER_NAME]) for module in here]
    return found


def weights_of(modules: list[nn.Module]) -> list[torch.Tensor] | None:
    """The weights, if a call of these modules is nothing but a product with them, and they can be stacked."""
    if any(
        type(module) not in (StateLinear, TokenTable)
        or module._forward_pre_hooks
        or module._forward_hooks
        or is_gathered(module)
        for module in modules
    ):
        return None
    weights = [module.weight for module in modules]
    first = (weights[0].shape, weights[0].dtype, weights[0].device)
    return weights if all((weight.shape, weight.dtype, weight.device) == first for weight in weights) else None


def stacked_reading(name: str, encoders: list[ThoughtEncoder]) -> Reading:
    """`ThoughtEncoder.reading` of layers that share a rule: both [L, r, r]."""
    rule = encoders[0].pte_rule[name]
    containers = ["pte_query_tokens", "pte_query", "pte_key", "pte_value"]
    if rule.num_global_tokens:
        containers.append("pte_global_tokens")
    columns = [weights_of([getattr(encoder, container)[name] for encoder in encoders]) for container in containers]
    # In every process each parameter has a gradient, also where nothing has been evicted: DDP waits for it.
    touches = torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
    taps: list[torch.Tensor] | None = []
    if rule.num_taps and torch.is_grad_enabled():
        taps = weights_of([encoder.pte_key_conv[name] for encoder in encoders])
    if taps is None or None in columns:
        query, initial = map(torch.stack, zip(*(encoder.reading(name) for encoder in encoders)))
        return Reading(query, initial + sum(e.touch(name) for e in encoders) if touches else initial)
    needed = columns if rule.num_global_tokens or touches else columns[:2]
    weights = list(map(torch.stack, needed))
    dtype = state_dtype(*weights)
    tokens, query_weight, *rest = (weight.to(dtype) for weight in weights)
    query = tokens @ query_weight.mT
    if rule.num_global_tokens:
        key_weight, value_weight, global_tokens = rest
        reading = reading_of(rule, query, global_tokens @ key_weight.mT, global_tokens @ value_weight.mT)
    else:
        reading = reading_of(rule, query)
    touched = [*(weights if touches else []), *([torch.stack(taps)] if taps else [])]
    if touched:  # the convolution always: what else it has a gradient from are evictions
        reading = reading._replace(initial=reading.initial + sum(weight[..., :0].sum() for weight in touched))
    return reading


class StackedEncoders(NamedTuple):
    """The encoders of one adapter in layers that can be encoded together, and their Q and S_0, each [L, r, r]."""

    name: str
    layers: Layers
    reading: Reading

    @classmethod
    @uncompiled
    def create(cls, name: str, layers: Layers) -> StackedEncoders:
        with full_precision():
            return cls(name, layers, stacked_reading(name, [encoder for _, encoder in layers]))

    @property
    def rule(self) -> StateRule:
        return self.layers[0][1].pte_rule[self.name]

    @property
    def indices(self) -> list[int]:
        """Which layers of the decoder these are."""
        return [attention.layer_idx for attention, _ in self.layers]

    def as_leaves(self) -> StackedEncoders:
        """The same with Q and S_0 as leaves of a new graph."""
        return self._replace(reading=Reading(*(x.detach().requires_grad_(x.requires_grad) for x in self.reading)))

    def reading_and_parameters(self) -> list[torch.Tensor]:
        """What of Q, S_0 and the encoders' parameters has a gradient."""
        parameters = (p for _, encoder in self.layers for p in encoder.parameters())
        return [x for x in (*self.reading, *parameters) if x.requires_grad]

    def start(self, batch_size: int) -> torch.Tensor:
        """As `ThoughtEncoder.start`: [L, B, rows, r]."""
        return start_of(self.rule, self.reading.initial, batch_size)

    @uncompiled
    def advance(self, cores: torch.Tensor | None, evicted: list[Evicted] | None, batch_size: int) -> torch.Tensor:
        """As `ThoughtEncoder.advance`: start cores, or carry them on, [L, B, rows, r]; `evicted`: of each layer."""
        with full_precision():
            cores = self.start(batch_size) if cores is None else cores
            if evicted is None or self.rule.update == "none":
                return cores
            if all(encoder.is_fused(self.name, gone.keys) for (_, encoder), gone in zip(self.layers, evicted)):
                return write_layers(self.name, cores, self.layers, evicted, self.reading.query)
            # One layer at a time, as the families' own rotations are applied.
            each = zip(self.layers, cores, evicted, self.reading.query)
            return torch.stack(
                [encoder.write(self.name, core, attention, gone, q) for (attention, encoder), core, gone, q in each]
            )

    @uncompiled
    def read(self, cores: torch.Tensor) -> torch.Tensor:
        """As `ThoughtEncoder.read`: [L, B, rows, r] -> [L, B, r, r]."""
        with full_precision():
            return read_layers(self.rule, cores, self.reading)


def grouped(name: str, layers: Layers) -> list[Layers]:
    """Layers in which an adapter is live, by what those that are encoded together share: rotation and device."""
    groups: dict[tuple[bool, torch.device], Layers] = {}
    for attention, encoder in layers:
        if name in encoder.live_adapters:
            uses_rope = getattr(attention, "use_rope", True)  # SmolLM3 has layers of both kinds
            groups.setdefault((uses_rope, device_of(encoder.pte_key[name])), []).append((attention, encoder))
    return list(groups.values())


@uncompiled
def has_gathered_encoders(decoder: nn.Module) -> bool:
    """Whether parameters of live encoders are there only while their module is called."""
    return any(
        name in container and is_gathered(container[name])
        for _, encoder in encoders_of(decoder)
        for container in (getattr(encoder, container) for container in encoder.adapter_layer_names)
        for name in encoder.live_adapters
    )


@uncompiled
def stack_encoders(decoder: nn.Module) -> list[StackedEncoders]:
    """The live encoders of all adapters, whose parameters must be there."""
    layers = encoders_of(decoder)
    names = dict.fromkeys(name for _, encoder in layers for name in encoder.live_adapters)
    return [StackedEncoders.create(name, group) for name in names for group in grouped(name, layers)]

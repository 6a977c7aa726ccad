"""The adapted projection: y = W x + scaling * A S B x (Eq. 5)."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import PTEConfig

NOT_MERGEABLE = (
    "PTE cannot be merged into the base weights: the update A S B depends on the thought state S, which differs from "
    "sequence to sequence and changes at every eviction. Keep the adapter attached, or use `unload()` to get the base "
    "model back."
)


def refuse_merge(*args: Any, **kwargs: Any) -> NoReturn:
    """Merging, unmerging and weighting all need a constant dW."""
    raise NotImplementedError(NOT_MERGEABLE)


class PTELayer(BaseTunerLayer):
    """What the projections and the thought encoder have in common: containers by adapter name."""

    adapter_layer_names: tuple[str, ...] = ("pte_A", "pte_B", "pte_dropout")
    other_param_names: tuple[str, ...] = ("pte_scaling",)

    merge = refuse_merge
    unmerge = refuse_merge

    @property
    def live_adapters(self) -> list[str]:
        """Names of the active adapters that are present here; empty if adapters are disabled."""
        if self._disable_adapters:
            return []
        present = getattr(self, self.other_param_names[0])
        return [name for name in self.active_adapters if name in present]

    def _adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        containers = (getattr(self, container) for container in self.adapter_layer_names)
        return [p for c in containers if adapter_name in c for p in c[adapter_name].parameters()]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; unlike the base class, an adapter that was frozen comes back frozen.

        PEFT makes every active adapter trainable when adapters are enabled again, also one that was loaded with
        `inference_mode` (huggingface/peft#3447).
        """
        if enabled == (not self._disable_adapters):
            return
        if not enabled:
            self._frozen_when_disabled = {
                name
                for name in self._get_available_adapters()
                if name in self.active_adapters and not any(p.requires_grad for p in self._adapter_parameters(name))
            }
            super().enable_adapters(False)
            return
        super().enable_adapters(True)
        for name in self._frozen_when_disabled & set(self.active_adapters):
            for parameter in self._adapter_parameters(name):
                parameter.requires_grad_(False)


class Linear(nn.Module, PTELayer):
    """A projection with a state-conditioned low-rank update.

    `pte_B[name]` is [r, in], `pte_A[name]` is [out, r]; the state `S` [B, r, r] is handed over by the attention
    module's hooks for the duration of one call and is never kept.
    """

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: PTEConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.pte_scaling: dict[str, float] = {}
        self.pte_A = nn.ModuleDict({})
        self.pte_B = nn.ModuleDict({})
        self.pte_dropout = nn.ModuleDict({})
        self.states: dict[str, torch.Tensor] | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PTEConfig) -> None:
        """Add (or replace) the parameters of one adapter."""
        self.pte_scaling[adapter_name] = config.pte_alpha / config.r
        self.pte_dropout[adapter_name] = nn.Dropout(config.pte_dropout) if config.pte_dropout else nn.Identity()
        self.pte_B[adapter_name] = nn.Linear(self.in_features, config.r, bias=False)
        self.pte_A[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """LoRA's initialisation: B random, A zero (or random, for tests)."""
        nn.init.kaiming_uniform_(self.pte_B[adapter_name].weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.pte_A[adapter_name].weight)
        else:
            nn.init.kaiming_uniform_(self.pte_A[adapter_name].weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [B, T, in] -> [B, T, out] in the dtype of the base layer's result."""
        result = self.base_layer(x, *args, **kwargs)
        live = self.live_adapters
        if not live:
            return result
        if self.states is None:
            raise RuntimeError(
                "A PTE projection was called outside of its attention module, so there is no thought state to use. "
                "Call the model, or disable the adapter with `with model.disable_adapter():`."
            )
        for name in live:
            A, B = self.pte_A[name], self.pte_B[name]
            z = B(self.pte_dropout[name](self._cast_input_dtype(x, B.weight.dtype)))
            z = z @ self.states[name].to(z.dtype).mT
            result = result + (A(z) * self.pte_scaling[name]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "pte." + super().__repr__()

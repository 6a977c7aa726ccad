"""The adapted projection: y = W x + scaling * A S B x (Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_pte_kernels import dispatch, low_rank_update

from .config import PTEConfig

NOT_MERGEABLE = (
    "PTE cannot be merged into the base weights: the update A S B depends on the thought state S, which differs from "
    "sequence to sequence and changes at every eviction. Keep the adapter attached, or use `unload()` to get the base "
    "model back."
)


def refuse_merge(*args: Any, **kwargs: Any) -> NoReturn:
    """Merging, unmerging and weighting all need a constant dW."""
    raise NotImplementedError(NOT_MERGEABLE)


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether a parameter is gathered on demand (FSDP, ZeRO-3)."""
    return any(hasattr(tensor, mark) for mark in ("full_tensor", "_fsdp_flattened", "ds_id"))


def is_gathered(module: nn.Module) -> bool:
    """Whether the weight is there, and where it is computed with, only while the module is called, or may be.

    FSDP, ZeRO-3, accelerate's offloading (weights on `meta`, fetched by a `forward` of its own), somebody's wrapper.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.is_meta or "forward" in vars(module):
        return True
    return is_sharded_tensor(weight)


def is_fused(modules: Sequence[nn.Module], *tensors: torch.Tensor, rank: int) -> bool:
    """Whether a Triton kernel computes on these tensors and on the weights of `modules`, which it reads as they lie.

    Weights that are gathered when their module is called (FSDP, ZeRO-3), or modules that somebody has replaced, take
    the PyTorch way.

    Raises:
        ValueError: `PTE_KERNELS=triton` asks for kernels that cannot be used.
    """
    if not dispatch.may_use_triton(tensors[0]):  # before a look at the weights, since it is asked in every step
        return False
    gathered = not all(isinstance(module, (nn.Linear, nn.Embedding)) and not is_gathered(module) for module in modules)
    if gathered and dispatch.MODE == "triton":
        raise ValueError(
            "PTE_KERNELS=triton was asked for, but the adapter's weights are sharded, offloaded or wrapped, so that "
            "they are there only while their module is called. Set PTE_KERNELS=auto."
        )
    return not gathered and dispatch.uses_triton(*tensors, *(module.weight for module in modules), rank=rank)


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer under an adapter, or the layer itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def widths_of(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer, or of a wrapper around a single one; None for any other module.

    Found by structure: several quantised layers (HQQ, GPTQ, AWQ, AQLM) are no `torch.nn.Linear` and have no `weight`,
    but say their widths.
    """
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        width_in, width_out = (getattr(layer, name, None) for name in names)
        if isinstance(width_in, int) and isinstance(width_out, int):
            return width_in, width_out
    children = list(layer.children())
    found = [widths for widths in map(widths_of, children) if widths is not None]
    return found[0] if len(found) == len(children) == 1 else None


def device_of(layer: nn.Module) -> torch.device:
    """Where a linear layer computes; quantised weights have names of their own, and some are buffers.

    A weight that accelerate has offloaded is on `meta` until the layer is called.
    """
    tensor = getattr(layer, "weight", None)
    device = next(chain(layer.parameters(), layer.buffers())).device if tensor is None else tensor.device
    execution_device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device(execution_device) if device.type == "meta" and execution_device is not None else device


class PTELayer(BaseTunerLayer):
    """What the projections and the thought encoder have in common: containers by adapter name."""

    adapter_layer_names: tuple[str, ...] = ("pte_A", "pte_B", "pte_gate", "pte_dropout")
    other_param_names: tuple[str, ...] = ("pte_scaling", "pte_reads_input")

    merge = refuse_merge
    unmerge = refuse_merge

    @property
    def live_adapters(self) -> list[str]:
        """Names of the active adapters that are present here; empty if adapters are disabled."""
        if self._disable_adapters:
            return []
        present = getattr(self, self.other_param_names[0])
        return [name for name in self.active_adapters if name in present]

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter is present here, active or not."""
        return adapter_name in getattr(self, self.other_param_names[0])

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


class AttentionCall:
    """What the hooks of an attention module hand to its projections for the duration of one call.

    Args:
        hidden_states: the module's input, [B, T, width].
        states: S of each adapter, [B, r, r].
        projections: all that are adapted.
        siblings: those of them that read the same input (q, k and v). The first one that is called computes all, so
            that they share their kernels, and leaves the results of the others here.
    """

    def __init__(
        self,
        hidden_states: torch.Tensor,
        states: dict[str, torch.Tensor],
        projections: Collection[Linear],
        siblings: list[Linear],
    ):
        self.hidden_states, self.states = hidden_states, states
        self.projections, self.siblings = projections, siblings
        self.input: torch.Tensor | None = None
        self.results: dict[Linear, torch.Tensor] = {}

    def take(self, projection: Linear, x: torch.Tensor) -> torch.Tensor | None:
        """The result of `projection` for `x`, if a sibling has computed it."""
        return self.results.pop(projection, None) if x is self.input else None

    def group(self, projection: Linear) -> list[Linear]:
        """The projections to compute together, `projection` first."""
        if projection not in self.siblings or self.input is not None:
            return [projection]
        return [projection, *(sibling for sibling in self.siblings if sibling is not projection)]


# While the forward of an attention module runs, in the thread in which it does: two threads may use one model.
current_call: ContextVar[AttentionCall | None] = ContextVar("pte_call", default=None)


class Linear(nn.Module, PTELayer):
    """A projection with a state-conditioned low-rank update.

    `pte_B[name]` is [r, in], `pte_A[name]` is [out, r]; the state `S` [B, r, r] is handed over by the attention
    module's hooks in `current_call`, for the duration of one call, and is never kept. With `output_gate` an output
    projection has `pte_gate[name]`, G [r, in] too, and adds `A (2 sigmoid(G x) * S B x)`.

    Args:
        key: the projection's name in the base model.
        hidden_size: of an output projection, the width of its attention module's input, which `B` reads with
            `output_source="hidden_states"`; None for projections that read that input anyway.
    """

    # The compiler knows no context variables. While it traces an attention module, its hooks write here instead, and
    # take it back in the same graph, so that nothing of it is left in the compiled code.
    traced_call: AttentionCall | None = None

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PTEConfig, key: str, hidden_size: int | None = None
    ):
        super().__init__()
        self.base_layer, self.hidden_size = base_layer, hidden_size
        widths = widths_of(base_layer)
        if widths is None:
            raise TypeError(f"A {type(base_layer).__name__} does not say its `in_features` and `out_features`.")
        self.in_features, self.out_features = widths
        self.pte_scaling: dict[str, float] = {}
        self.pte_reads_input: dict[str, bool] = {}  # of the projection; else the attention module's
        self.pte_A = nn.ModuleDict({})
        self.pte_B = nn.ModuleDict({})
        self.pte_gate = nn.ModuleDict({})
        self.pte_dropout = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    def update_layer(self, adapter_name: str, config: PTEConfig, key: str) -> None:
        """Add (or replace) the parameters of one adapter."""
        self.pte_scaling[adapter_name] = config.scaling_of(key)
        self.pte_dropout[adapter_name] = nn.Dropout(config.pte_dropout) if config.pte_dropout else nn.Identity()
        reads_input = self.hidden_size is None or config.output_source == "attention_output"
        self.pte_reads_input[adapter_name] = reads_input
        width = self.in_features if reads_input else self.hidden_size
        self.pte_B[adapter_name] = nn.Linear(width, config.r, bias=False)
        if self.hidden_size is not None and config.has_output_gate:
            self.pte_gate[adapter_name] = nn.Linear(width, config.r, bias=False)
        elif adapter_name in self.pte_gate:
            del self.pte_gate[adapter_name]
        self.pte_A[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name, device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """LoRA's initialisation: B random, A zero (or random, for tests); all gates at one (or random)."""
        nn.init.kaiming_uniform_(self.pte_B[adapter_name].weight, a=math.sqrt(5))
        for container in (self.pte_A, self.pte_gate):
            if adapter_name not in container:
                continue
            if init_weights:
                nn.init.zeros_(container[adapter_name].weight)
            else:
                nn.init.kaiming_uniform_(container[adapter_name].weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [B, T, in] -> [B, T, out] in the dtype of the base layer's result."""
        live = self.live_adapters
        if not live:
            return self.base_layer(x, *args, **kwargs)
        call = self.traced_call or current_call.get()
        if call is None or self not in call.projections:
            raise RuntimeError(
                "A PTE projection was called outside of its attention module, so there is no thought state to use. "
                "Call the model, or disable the adapter with `with model.disable_adapter():`."
            )
        if not args and not kwargs:
            result = call.take(self, x)
            if result is not None:
                return result
            if self._is_fused(x, live):
                return self._fused_forward(x, live, call)
        result = self.base_layer(x, *args, **kwargs)
        for name in live:
            A, B = self.pte_A[name], self.pte_B[name]
            asked = x if self.pte_reads_input[name] else call.hidden_states
            asked = self.pte_dropout[name](self._cast_input_dtype(asked, B.weight.dtype))
            z = B(asked)
            z = z @ call.states[name].to(z.dtype).mT
            if name in self.pte_gate:
                z = z * (2 * torch.sigmoid(self.pte_gate[name](asked)))
            result = result + (A(z) * self.pte_scaling[name]).to(result.dtype)
        return result

    def _is_fused(self, x: torch.Tensor, live: list[str]) -> bool:
        ranks = [self.pte_B[name].out_features for name in live]
        containers = (self.pte_A, self.pte_B, self.pte_gate)
        modules = [container[name] for container in containers for name in live if name in container]
        return is_fused(modules, x, rank=max(ranks))

    def _drops(self, live: list[str]) -> bool:
        return self.training and any(isinstance(self.pte_dropout[name], nn.Dropout) for name in live)

    def _fused_forward(self, x: torch.Tensor, live: list[str], call: AttentionCall) -> torch.Tensor:
        """As `forward`, by kernels that serve this projection and its siblings together."""
        group = call.group(self)
        if self._drops(live) or any(
            p.live_adapters != live or p._drops(live) or not p._is_fused(x, live) for p in group[1:]
        ):
            group = [self]  # with dropout every projection sees an input of its own
        group = [p for p in group if p.pte_scaling == self.pte_scaling]  # else in its own call
        results = [p.base_layer(x) for p in group]
        autocast = torch.is_autocast_enabled(x.device.type)
        for name in live:
            asked = x if self.pte_reads_input[name] else call.hidden_states
            asked = asked.to(torch.get_autocast_dtype(x.device.type)) if autocast else asked
            results = low_rank_update(
                self.pte_dropout[name](asked),
                results,
                call.states[name],
                [p.pte_A[name].weight for p in group],
                [p.pte_B[name].weight for p in group],
                self.pte_scaling[name],
                self.pte_gate[name].weight if name in self.pte_gate else None,
            )
        call.input = x if len(group) > 1 else call.input
        call.results.update(zip(group[1:], results[1:]))
        return results[0]

    def __repr__(self) -> str:
        return "pte." + super().__repr__()

"""What is compared: the frozen base, LoRA and PTE in several forms, and controls that take the states away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from peft_pte import PTEConfig
from peft_pte.encoder import ThoughtEncoder
from peft_pte.stacked import StackedEncoders
from variants import with_gate, with_orthogonal_query, with_transposed_read, with_values_scaled

EVICTION_RATIO = 0.5  # half the window at once: fewer segments than with the default, and so faster on a CPU
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Arm:
    """One way to adapt the base.

    `adapter`: `"none"`, `"lora"`, `"pte"` or `"oracle"` (no model at all). `windowed`: under the bounded cache, which
    PTE always is. `settings`: of `PTEConfig`. `rank`, `scaling`: others than the common ones; rank "matched" gives LoRA
    as many trained parameters as PTE has. `variant`: a change of the method that the package does not have, in force
    while the arm is trained and evaluated.
    """

    adapter: str
    windowed: bool
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int | Literal["matched"] | None = None
    scaling: float | None = None
    variant: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_trained(self) -> bool:
        return self.adapter != "none"


def pte(**settings: Any) -> Arm:
    return Arm("pte", windowed=True, settings=settings)


MAIN_ARMS: dict[str, Arm] = {
    "base, full cache": Arm("none", windowed=False),
    "base, windowed": Arm("none", windowed=True),
    "LoRA, full cache": Arm("lora", windowed=False),
    "LoRA, windowed": Arm("lora", windowed=True),
    "LoRA, windowed, parameters of PTE": Arm("lora", windowed=True, rank="matched"),
    "Global-only": pte(state_update="none"),
    "PTE, paper (sum, norm on write)": pte(state_update="sum", state_norm="write"),
    "PTE, sum, norm on read": pte(state_update="sum", state_norm="read"),
    "PTE, delta, norm on read": pte(state_update="delta", state_norm="read"),
    "PTE, delta, no norm": pte(state_update="delta", state_norm="none"),
    "PTE, no global tokens": pte(num_global_tokens=0),
    "PTE": pte(),
}
# One choice changed at a time from "PTE", which has the package's default rule but a scaling of 1 (there it is 1/2).
# With rank 32 two, to see what keeps its training from collapsing.
DESIGN_ARMS: dict[str, Arm] = {
    "PTE, sum, bounded": pte(state_update="sum", state_norm="bound"),
    "PTE, sum, bounded, transposed read": replace(
        pte(state_update="sum", state_norm="bound"), variant=with_transposed_read
    ),
    "PTE, keys relative to the chunk": pte(encode_keys="chunk"),
    "PTE, keys after RoPE": pte(encode_keys="post_rope"),
    "PTE, truncated gradient": pte(gradient="truncated"),
    "PTE, q and o": pte(target_modules=["q_proj", "o_proj"]),
    "PTE, v and o": pte(target_modules=["v_proj", "o_proj"]),
    "PTE, scaling 1/4": replace(pte(), scaling=1 / 4),
    "PTE, scaling 1/2": replace(pte(), scaling=1 / 2),
    "PTE, scaling 4": replace(pte(), scaling=4.0),
    "PTE, W_V starts 1/4 as large": replace(pte(), variant=partial(with_values_scaled, 0.25)),
    "PTE, W_V starts 4 times as large": replace(pte(), variant=partial(with_values_scaled, 4.0)),
    "PTE, orthogonal query at the start": replace(pte(), variant=with_orthogonal_query),
    "PTE, rank 8": Arm("pte", windowed=True, rank=8),
    "PTE, rank 32": Arm("pte", windowed=True, rank=32),
    "PTE, rank 32, scaling 1/2": Arm("pte", windowed=True, rank=32, scaling=1 / 2),
    "PTE, rank 32, truncated gradient": Arm("pte", windowed=True, rank=32, settings=dict(gradient="truncated")),
    "PTE, no convolution": pte(conv_size=1),
    "PTE, learned gate": replace(pte(), variant=partial(with_gate, False)),
    "PTE, learned gate on projections": replace(pte(), variant=partial(with_gate, True)),
}
# The best that one matrix of the state's size can do on recall; see oracle.py.
ORACLE_ARMS = {f"oracle, rank {rank}": Arm("oracle", windowed=False, rank=rank) for rank in (8, 16, 32)}
ARMS = MAIN_ARMS | DESIGN_ARMS | ORACLE_ARMS


def adapt(
    base: torch.nn.Module,
    arm: Arm,
    rank: int,
    window_size: int,
    scaling: float = 1.0,
    matched_rank: int = 25,
    **cache: Any,
) -> torch.nn.Module:
    """Attach the adapter of an arm, with rank and scaling unless it has its own. `cache`: more of `PTEConfig`."""
    rank = matched_rank if arm.rank == "matched" else arm.rank or rank
    scaling = arm.scaling or scaling
    if arm.adapter == "lora":
        lora = LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=PROJECTIONS)
        base = inject_adapter_in_model(lora, base)
    if not arm.windowed:
        return base
    if arm.adapter == "pte":
        shared = dict(r=rank, pte_alpha=rank * scaling, num_global_tokens=rank // 2)
        return with_window(base, window_size, **(shared | arm.settings | cache))
    # The bounded cache alone: a PTE adapter that is switched to nothing (A = 0, frozen).
    model = with_window(base, window_size, r=1, num_global_tokens=1, state_update="none", **cache)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def with_window(base: torch.nn.Module, window_size: int, **settings: Any) -> PeftModel:
    return get_peft_model(
        base,
        PTEConfig(task_type="CAUSAL_LM", window_size=window_size, eviction_ratio=EVICTION_RATIO, **settings),
    )


@contextmanager
def states_swapped() -> Iterator[None]:
    """Every row gets the state of its neighbour in the batch: chance, if the state carries what is asked for."""
    read_all, read = ThoughtEncoder.read_all, StackedEncoders.read

    def swapped(self: ThoughtEncoder, cores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: state.roll(1, 0) for name, state in read_all(self, cores).items()}

    def swapped_in_all_layers(self: StackedEncoders, cores: torch.Tensor) -> torch.Tensor:
        return read(self, cores).roll(1, 1)

    with (
        patch.object(ThoughtEncoder, "read_all", swapped),
        patch.object(StackedEncoders, "read", swapped_in_all_layers),
    ):
        yield


@contextmanager
def states_zeroed() -> Iterator[None]:
    """Every state is what it was before the first eviction."""
    read_all, read = ThoughtEncoder.read_all, StackedEncoders.read

    def zeroed(self: ThoughtEncoder, cores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return read_all(self, {name: self.start(name, core.shape[0]) for name, core in cores.items()})

    def zeroed_in_all_layers(self: StackedEncoders, cores: torch.Tensor) -> torch.Tensor:
        return read(self, self.start(cores.shape[1]))

    with (
        patch.object(ThoughtEncoder, "read_all", zeroed),
        patch.object(StackedEncoders, "read", zeroed_in_all_layers),
    ):
        yield


CONTROLS = {"states swapped": states_swapped, "states zeroed": states_zeroed}

"""What is compared: the frozen base, LoRA and PTE in several forms, and controls that take the states away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from baselines import compressed, delethink
from candidates import (
    with_channel_gates,
    with_convolved_values,
    with_heads,
    with_least_squares,
    with_length_as_gate,
    with_neighbour_from_the_start,
)
from peft_pte import PTEConfig, pretrained_config
from shared import states_swapped, states_zeroed
from variants import with_gate, with_orthogonal_query, with_transposed_read, with_values_scaled

EVICTION_RATIO = 0.5  # half the window at once: fewer segments than with the default, and so faster on a CPU
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Arm:
    """One way to adapt the base.

    `adapter`: `"none"`, `"lora"`, `"pte"` or `"oracle"` (no model at all). `windowed`: under the bounded cache, which
    PTE always is. `settings`: of `PTEConfig`. `rank`, `scaling`: others than the common ones; rank "matched" gives LoRA
    as many trained parameters as PTE has. `slower`: by how much the learning rate is smaller (below 1: larger), by a
    part of the parameters' names. `variant`: a change of the method that the package does not have, in force while the
    arm is trained and evaluated. `answer`: another way to read streams (baselines.py), in PTE's bytes: (model,
    stream, length of the prompt, tokens that fit) -> NLL and correctness of what is scored. `distilled`: learns without
    labels from the base with its full cache, on all tokens after the first eviction, instead of from the answers.
    `update_scale`: scalings of the layers in proportion to the base's outputs (`pretrained_config`).
    `transfer`: before that, so many batches of attention transfer, which knows no labels either.
    """

    adapter: str
    windowed: bool
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int | Literal["matched"] | None = None
    scaling: float | None = None
    slower: dict[str, float] = field(default_factory=dict)
    variant: Callable[[], AbstractContextManager[None]] = nullcontext
    answer: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    distilled: bool = False
    transfer: int = 0
    update_scale: float | None = None

    @property
    def is_trained(self) -> bool:
        return self.adapter != "none"

    def scaling_among(self, usual: float) -> float | str:
        """What a table says of the scaling, where that of other arms is `usual`."""
        return f"{self.update_scale} x base" if self.update_scale else self.scaling or usual

    def slower_by(self, parameter: str) -> float:
        return next((factor for part, factor in self.slower.items() if part in parameter), 1.0)


def pte(**settings: Any) -> Arm:
    return Arm("pte", windowed=True, settings=settings)


# What the package did before: a key is written as it is, and the output projection asks with its own input.
BEFORE: dict[str, Any] = dict(conv_size=1, output_source="attention_output", output_gate=False)


def before(**settings: Any) -> Arm:
    return pte(**(BEFORE | settings))


MAIN_ARMS: dict[str, Arm] = {
    "base, full cache": Arm("none", windowed=False),
    "base, windowed": Arm("none", windowed=True),
    "LoRA, full cache": Arm("lora", windowed=False),
    "LoRA, windowed": Arm("lora", windowed=True),
    "LoRA, windowed, parameters of PTE": Arm("lora", windowed=True, rank="matched"),
    "Global-only": pte(state_update="none"),
    "PTE, paper (sum, norm on write)": before(state_update="sum", state_norm="write"),
    "PTE, first design": before(),
    "PTE": pte(),
}
# One choice changed at a time from "PTE", the package's default.
CANDIDATES: dict[str, Arm] = {
    "PTE, no convolution": pte(conv_size=1),
    "PTE, convolution over 4": pte(conv_size=4),
    "PTE, convolution starts with the neighbour": replace(pte(), variant=with_neighbour_from_the_start),
    "PTE, convolution starts with half the neighbour": replace(
        pte(), variant=partial(with_neighbour_from_the_start, 0.5)
    ),
    "PTE, values convolved too": replace(pte(), variant=with_convolved_values),
    "PTE, no output gate": pte(output_gate=False),
    "PTE, output asks with attention output": pte(output_source="attention_output", output_gate=False),
    "PTE, q and o only": pte(target_modules=["q_proj", "o_proj"]),
    "PTE, o only": pte(target_modules=["o_proj"]),
    "PTE, 4 heads": replace(pte(), variant=with_heads),
    "PTE, least squares": replace(pte(), variant=with_least_squares),
    "PTE, gates of channels": replace(pte(), variant=with_channel_gates),
    "PTE, length of keys as gate": replace(pte(), variant=with_length_as_gate),
    "PTE, gate of writes": pte(write_gate=True),
    "PTE, starts as attention": pte(init_weights="attention"),
    "PTE, gate of writes, starts as attention": pte(write_gate=True, init_weights="attention"),
    "PTE, encoder learns 3 times slower": replace(pte(), slower={"thought_encoder": 3.0}),
    "PTE, A and B learn 3 times slower": replace(pte(), slower={"pte_A": 3.0, "pte_B": 3.0}),
    "PTE, q, k and v learn 10 times slower": replace(pte(), slower={f"{name}_proj": 10.0 for name in "qkv"}),
    "PTE, A learns 4 times faster": replace(pte(), slower={"pte_A": 1 / 4}),
    "PTE, A of the output learns 4 times faster": replace(pte(), slower={"o_proj.pte_A": 1 / 4}),
    "PTE, A of the output learns 16 times faster": replace(pte(), slower={"o_proj.pte_A": 1 / 16}),
    "PTE, scaling 1": replace(pte(), scaling=1.0),
    "PTE, scaling 2": replace(pte(), scaling=2.0),
    "PTE, scaling 1/4": replace(pte(), scaling=1 / 4),
    "PTE, rank 16": replace(pte(), rank=16),
    "PTE, truncated gradient": pte(gradient="truncated"),
}
# For notes on SmolLM2: the outputs of the layers around 18, whose state alone finds whose a number is, larger updates;
# and what changes one thing of that.
OUTPUTS: dict[str, Any] = dict(target_modules=["o_proj"])
MIDDLE = OUTPUTS | dict(layers_to_transform=list(range(14, 24)))
GATE, START = dict(write_gate=True), dict(init_weights="attention")
BY_HAND = replace(pte(**MIDDLE, **GATE, **START), scaling=12.0)
CHECKPOINT: dict[str, Arm] = {
    "PTE, outputs of layers 14 to 23, gate of writes, starts as attention": BY_HAND,
    "PTE, outputs of layers 14 to 23": replace(pte(**MIDDLE), scaling=12.0),
    "PTE, outputs of layers 14 to 23, gate of writes": replace(pte(**MIDDLE, **GATE), scaling=12.0),
    "PTE, outputs of layers 14 to 23, starts as attention": replace(pte(**MIDDLE, **START), scaling=12.0),
    "PTE, outputs of layers 14 to 23, gate of writes, starts as attention, scaling 4": replace(BY_HAND, scaling=4.0),
    "PTE, outputs of layers 14 to 23, gate of writes, starts as attention, scaling 24": replace(BY_HAND, scaling=24.0),
    "PTE, outputs of all layers, gate of writes, starts as attention": replace(
        pte(**OUTPUTS, **GATE, **START), scaling=12.0
    ),
    "PTE, pretrained_config": Arm("pte", windowed=True, update_scale=8.0),
}
CHECKPOINT |= {
    f"{name}, {how}": replace(arm, **changes)
    for name, arm in CHECKPOINT.items()
    for how, changes in {
        "distilled": dict(distilled=True),
        "attention transfer": dict(transfer=192),
        "attention transfer, distilled": dict(transfer=192, distilled=True),
    }.items()
}
# One choice changed at a time from the first design, whose tables are in results/first_design (`--first-design`).
FIRST_DESIGN: dict[str, Arm] = {
    "PTE, sum, norm on read": before(state_update="sum", state_norm="read"),
    "PTE, delta, norm on read": before(state_update="delta", state_norm="read"),
    "PTE, delta, no norm": before(state_update="delta", state_norm="none"),
    "PTE, no global tokens": before(num_global_tokens=0),
    "PTE, sum, bounded": before(state_update="sum", state_norm="bound"),
    "PTE, sum, bounded, transposed read": replace(
        before(state_update="sum", state_norm="bound"), variant=with_transposed_read
    ),
    "PTE, first design, keys relative to the chunk": before(encode_keys="chunk"),
    "PTE, first design, keys after RoPE": before(encode_keys="post_rope"),
    "PTE, first design, truncated gradient": before(gradient="truncated"),
    "PTE, first design, q and o": before(target_modules=["q_proj", "o_proj"]),
    "PTE, first design, v and o": before(target_modules=["v_proj", "o_proj"]),
    "PTE, first design, scaling 1/4": replace(before(), scaling=1 / 4),
    "PTE, first design, scaling 1/2": replace(before(), scaling=1 / 2),
    "PTE, first design, scaling 4": replace(before(), scaling=4.0),
    "PTE, first design, W_V starts 1/4 as large": replace(before(), variant=partial(with_values_scaled, 0.25)),
    "PTE, first design, W_V starts 4 times as large": replace(before(), variant=partial(with_values_scaled, 4.0)),
    "PTE, first design, orthogonal query at the start": replace(before(), variant=with_orthogonal_query),
    "PTE, first design, rank 8": replace(before(), rank=8),
    "PTE, first design, rank 32": replace(before(), rank=32),
    "PTE, first design, rank 32, scaling 1/2": replace(before(), rank=32, scaling=1 / 2),
    "PTE, first design, rank 32, truncated gradient": replace(before(gradient="truncated"), rank=32),
    "PTE, first design, learned gate": replace(before(), variant=partial(with_gate, False)),
    "PTE, first design, learned gate on projections": replace(before(), variant=partial(with_gate, True)),
}
# The best that one matrix of the state's size can do on recall; see oracle.py.
ORACLE_ARMS = {f"oracle, rank {rank}": Arm("oracle", windowed=False, rank=rank) for rank in (8, 16, 32)}
# What the field does with as many bytes of cache, without training.
BASELINES = {
    "base, Delethink": Arm("none", windowed=False, answer=delethink),
    "base, cache compressed (KNorm)": Arm("none", windowed=False, answer=partial(compressed, "KnormPress")),
    "base, cache compressed (KeyDiff)": Arm("none", windowed=False, answer=partial(compressed, "KeyDiffPress")),
    "base, cache compressed (TOVA)": Arm("none", windowed=False, answer=partial(compressed, "TOVAPress")),
}
ARMS = MAIN_ARMS | BASELINES | CANDIDATES | CHECKPOINT | FIRST_DESIGN | ORACLE_ARMS


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
        base = inject_adapter_in_model(lora(rank, scaling), base)
    if not arm.windowed:
        return base
    if arm.adapter == "pte":
        settings = dict(r=rank, num_global_tokens=rank // 2) | arm.settings | cache
        if arm.update_scale is None:
            return with_window(base, window_size, pte_alpha=rank * scaling, **settings)
        return get_peft_model(base, pretrained_config(base, arm.update_scale, **bounded(window_size), **settings))
    # The bounded cache alone: a PTE adapter that is switched to nothing (A = 0, frozen).
    model = with_window(base, window_size, r=1, num_global_tokens=1, state_update="none", **cache)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def lora(rank: int, scaling: float) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=PROJECTIONS)


def with_window(base: torch.nn.Module, window_size: int, **settings: Any) -> PeftModel:
    return get_peft_model(base, PTEConfig(**bounded(window_size), **settings))


def bounded(window_size: int) -> dict[str, Any]:
    """Fields that all arms under the window share."""
    return dict(task_type="CAUSAL_LM", window_size=window_size, eviction_ratio=EVICTION_RATIO)


CONTROLS = {"states swapped": states_swapped, "states zeroed": states_zeroed}

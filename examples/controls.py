"""Controls: what a trained adapter does where its states say nothing, and other adapters under the bounded cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from peft import PeftModel, inject_adapter_in_model

from peft_pte import PTEConfig, ThoughtEncoder
from peft_pte.stacked import StackedEncoders


@contextlib.contextmanager
def states_zeroed() -> Iterator[None]:
    """Every state is read from what an empty cache carries: what is left is what the adapter does without memory."""
    read_all, read = ThoughtEncoder.read_all, StackedEncoders.read

    def empty(self: ThoughtEncoder, cores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return read_all(self, {name: self.start(name, len(core)) for name, core in cores.items()})

    def empty_in_all_layers(self: StackedEncoders, cores: torch.Tensor) -> torch.Tensor:
        return read(self, self.start(cores.shape[1]))

    with patch.object(ThoughtEncoder, "read_all", empty), patch.object(StackedEncoders, "read", empty_in_all_layers):
        yield


@contextlib.contextmanager
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


def add_window(model: PeftModel, config: PTEConfig) -> None:
    """Put a model with another adapter under PTE's bounded cache, without the encoding.

    A PTE adapter that is switched to nothing (`A` is zero at its start, and frozen) goes into the base. The PeftModel
    goes on knowing its own adapter only.
    """
    base = model.get_base_model()
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    known = base.__dict__.pop("peft_config")
    inject_adapter_in_model(config, base)
    base.peft_config = known
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)

"""Controls: what a trained adapter does where its states say nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from peft_pte import ThoughtEncoder
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

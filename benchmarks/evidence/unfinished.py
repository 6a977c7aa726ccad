"""What a run that was killed goes on from: on a real checkpoint an arm takes long."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Unfinished:
    """A file with a run's rows so far and what its training needs to go on as if nothing had happened.

    It is named after everything that the run depends on, so that no other run goes on from it.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, *identity: Any) -> Unfinished:
        return cls(folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.pt")

    def save(
        self, step: int, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = dict(step=step, parameters=parameters, optimizer=optimizer.state_dict())
        part = self.path.with_suffix(".part")
        torch.save(state | dict(generator=generator.get_state(), rows=self.rows), part)
        part.replace(self.path)

    def load(self, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """The steps that are done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu")
        for parameter, value in zip(parameters, state["parameters"]):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        self.rows[:] = state["rows"]
        return state["step"]

"""What a run that was killed goes on from: on a real checkpoint an arm takes long."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Step(NamedTuple):
    """What a step of training tells; the gradient's norm is that before it is clipped to 1."""

    number: int
    loss: float
    gradient_norm: float


@dataclass
class Unfinished:
    """A file with a run's rows and steps so far and what its training needs to go on as if nothing had happened.

    It is named after everything that the run depends on, so that no other run goes on from it.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, *identity: Any) -> Unfinished:
        return cls(folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.pt")

    def save(
        self, step: int, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = dict(step=step, parameters=parameters, optimizer=optimizer.state_dict())
        part = self.path.with_suffix(".part")
        told = dict(rows=self.rows, steps=list(map(tuple, self.steps)))
        torch.save(state | told | dict(generator=generator.get_state()), part)
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
        self.rows[:], self.steps[:] = state["rows"], [Step(*step) for step in state["steps"]]
        return state["step"]

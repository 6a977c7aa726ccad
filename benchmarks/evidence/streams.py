"""What a task is: streams whose evidence stands in thoughts that can be evicted, at a controlled distance.

Every stream reads: prompt | evidence | filler | questions and answers. The prompt is the same in all streams, and the
filler has nothing to do with the evidence, so neither tells anything about the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Stream(NamedTuple):
    """Rows of equal length without padding, and of one layout: rows of a mask are equal."""

    input_ids: torch.Tensor  # [N, T] int64
    answers: torch.Tensor  # [N, T] bool: tokens to be predicted from what stands before them
    scored: torch.Tensor  # [N, T] bool: those answers whose accuracy counts, equally many in each row

    def to(self, device: torch.device) -> Stream:
        return Stream(*(x.to(device) for x in self))

    def until_scored(self) -> Stream:
        """Without what stands behind the last scored token, which has no part in its prediction."""
        length = int(self.scored[0].nonzero().max()) + 1
        return Stream(*(x[:, :length] for x in self))


def answers(logits: torch.Tensor, input_ids: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL and correctness, [N, columns], of the tokens at `columns`, from the logits before them [N, columns, V]."""
    expected, logits = input_ids[:, columns], logits.float()
    nll = F.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
    return nll, logits.argmax(-1) == expected


class Parts(NamedTuple):
    """What a task writes before and after the filler. Masks are over columns: all rows have one layout."""

    evidence: torch.Tensor  # [N, E] int64
    questions: torch.Tensor  # [N, Q] int64, with their answers
    evidence_answers: torch.Tensor  # [E] bool
    answers: torch.Tensor  # [Q] bool
    scored: torch.Tensor  # [Q] bool


def shuffled(size: int, count: int, generator: torch.Generator, first: int | None = None) -> torch.Tensor:
    """[size, count]: a permutation of 0..count - 1 in each row; [size, first]: its beginning alone, which is faster."""
    random = torch.rand(size, count, generator=generator)
    return random.argsort(1) if first is None else random.topk(first, largest=False).indices


def pick(allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[N]: the index of a random True in each row of `allowed` [N, C]; any index where there is none."""
    return torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1).argmax(1)


def every(width: int, count: int, first_only: bool = False) -> torch.Tensor:
    """[width * count] bool: the last token of each query (of the first one alone) of `width` tokens."""
    mask = torch.zeros(count, width, dtype=torch.bool)
    mask[: 1 if first_only else count, -1] = True
    return mask.flatten()


class Task(ABC):
    """What training, evaluation and report read of a task."""

    name: str
    prompt_length: int  # never evicted, without evidence
    difficulty: dict[str, int]  # defaults of the keyword arguments of `sample` and `chance`
    settings: dict[str, Any] = {}  # where those of training.py are others than usual
    grpo: dict[str, Any] = {}  # where those of rl.py are
    is_taught = False  # whether a base that comes from a checkpoint learns the task first, with its full cache
    whole_answers = False  # whether a row is right if all its scored tokens are, or each token counts for itself
    matched_rank = 25  # of LoRA with as many trained parameters as PTE has, at the sizes of this task's base

    def sample(self, size: int, distance: int, generator: torch.Generator, **difficulty: int) -> Stream:
        """`size` streams with `distance` tokens of filler between the last token of evidence and the first question."""
        parts = self.write(size, generator, self.completed(difficulty))
        noise, prompt = self.noise(size, distance, generator), self.prompt(size)
        ids = torch.cat([prompt, parts.evidence, noise, parts.questions], 1)
        before = torch.zeros(self.prompt_length, dtype=torch.bool)
        between = torch.zeros(distance, dtype=torch.bool)
        answers = torch.cat([before, parts.evidence_answers, between, parts.answers])
        scored = torch.cat([before, torch.zeros_like(parts.evidence_answers), between, parts.scored])
        return Stream(ids, answers.repeat(size, 1), scored.repeat(size, 1))

    def length(self, distance: int, **difficulty: int) -> int:
        """Tokens of a stream."""
        return self.sample(1, distance, torch.Generator(), **difficulty).input_ids.shape[1]

    def opened(self, folder: Path) -> Task:
        """The task with what it takes from its base's folder: it can sample only then."""
        return self

    @property
    def held_out(self) -> Task:
        """What the evaluation samples from. A stream depends on the generator alone, so another seed is enough."""
        return self

    def chance(self, **difficulty: int) -> float:
        """Accuracy of a uniform guess among the possible answers of what is scored."""
        return 1 / self.possible_answers(self.completed(difficulty))

    def completed(self, difficulty: dict[str, int]) -> dict[str, int]:
        """`difficulty` with the defaults for what it leaves out, checked."""
        if unknown := difficulty.keys() - self.difficulty.keys():
            raise TypeError(f"{self.name} has no {', '.join(sorted(unknown))}; it has {', '.join(self.difficulty)}")
        given = {**self.difficulty, **difficulty}
        if fault := self.fault(given):
            raise ValueError(f"{self.name}: {fault}, not {given}")
        return given

    @abstractmethod
    def kv_width(self, hidden_size: int) -> int:
        """Width of a cached key or value, over all heads, in a base of this width."""

    @abstractmethod
    def fault(self, given: dict[str, int]) -> str:
        """What is wrong with this difficulty: the condition it breaks, or nothing."""

    @abstractmethod
    def possible_answers(self, given: dict[str, int]) -> int: ...

    @abstractmethod
    def prompt(self, size: int) -> torch.Tensor:
        """[size, prompt_length]: the same in all rows."""

    @abstractmethod
    def noise(self, size: int, distance: int, generator: torch.Generator) -> torch.Tensor:
        """[size, distance]: filler."""

    @abstractmethod
    def write(self, size: int, generator: torch.Generator, given: dict[str, int]) -> Parts: ...


class SymbolTask(Task):
    """A task over a few symbols, for a small base of its own; `fault`, `possible_answers`, `write` make a new one."""

    prompt_length = 4
    prompt_token = 1
    filler = range(2, 6)
    vocab_size: int
    # The base: a small Llama that was seen to solve the task, and its loss at which the filler gets longer.
    base_layers, base_heads, solved_loss = 4, 4, 0.2

    def prompt(self, size: int) -> torch.Tensor:
        return torch.full((size, self.prompt_length), self.prompt_token)

    def noise(self, size: int, distance: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.filler.start, self.filler.stop, (size, distance), generator=generator)

    def kv_width(self, hidden_size: int) -> int:
        return hidden_size

    def base_difficulty(self, generator: torch.Generator) -> dict[str, int]:
        """What is not usual in the next batch that the base is trained on."""
        return {}


def symbols(*sizes: int) -> list[range]:
    """Consecutive ranges of tokens, after padding (0, never used), the prompt's token and the filler."""
    borders = list(accumulate(sizes, initial=SymbolTask.filler.stop))
    return [range(start, stop) for start, stop in zip(borders, borders[1:])]

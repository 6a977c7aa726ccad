"""What a state of one size can hold at best: one matrix that is told each pair as a symbol, and nothing else."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from arms import ARMS
from peft_pte_kernels.reference import delta_update
from streams import Stream
from tasks import TASKS, Recall
from training import Settings, about_training, evictions

STEPS, BATCH_SIZE, LEARNING_RATE = 2000, 128, 2e-2


class Oracle(nn.Module):
    """One matrix [rank, rank], written by the delta rule of the package, with a learned code for each symbol.

    It is spared what the model must learn: to bind a value to the key before it, to leave filler out, to ask.
    """

    def __init__(self, task: Recall, rank: int):
        super().__init__()
        self.task, self.rank = task, rank
        self.key, self.query = nn.Embedding(len(task.keys), rank), nn.Embedding(len(task.keys), rank)
        self.value, self.answer = nn.Embedding(len(task.values), rank), nn.Embedding(len(task.values), rank)

    def forward(self, stream: Stream, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, values] of the scored answer, and the answer [N]."""
        ids, first = stream.input_ids, self.task.prompt_length
        evidence = ids[:, first : first + 2 * pairs]
        keys, values = evidence[:, ::2] - self.task.keys.start, evidence[:, 1::2] - self.task.values.start
        column = int(stream.scored[0].int().argmax())
        asked, answer = ids[:, column - 1] - self.task.keys.start, ids[:, column] - self.task.values.start
        core = delta_update(torch.zeros(len(ids), self.rank, self.rank), self.key(keys), self.value(values), None)
        found = (self.query(asked)[:, None] @ core)[:, 0]
        return found @ self.answer.weight.mT, answer


def run_oracle(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Rows as of the other arms. Filler is not written, so a distance differs only in its streams."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task, difficulty, start = TASKS[settings.task], dict(settings.difficulty), time.time()
    if not isinstance(task, Recall):
        raise TypeError(f"{name} knows pairs of keys and values only, not {task.name}")
    pairs = task.completed(difficulty)["pairs"]
    model, generator = Oracle(task, ARMS[name].rank or settings.rank), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(*model(task.sample(BATCH_SIZE, 0, generator, **difficulty), pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = []
    for distance in settings.distances:
        stream = settings.held_out(distance)
        with torch.no_grad():
            logits, answer = model(stream, pairs)
        accuracy = (logits.argmax(-1) == answer).float().mean().item()
        nll = F.cross_entropy(logits, answer).item()
        values = dict(accuracy=round(accuracy, 4), nll=round(nll, 4))
        told = dict(control="", distance=distance, evictions=evictions(stream, task, settings), streams=len(answer))
        rows.append(told | values)
    about = dict(arm=name, seed=seed, parameters=sum(p.numel() for p in model.parameters()))
    about |= dict(train_loss=round(loss.item(), 4), seconds=round(time.time() - start))
    return [about | row | dict(step=settings.steps) | about_training(settings, ARMS[name]) for row in rows]

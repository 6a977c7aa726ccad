"""What each process of test_distributed.py runs: one rank's rows, under DDP or FSDP2, on the CPU with gloo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from models import tiny_model, with_adapter
from processes import group
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from peft_pte import attention_loss, distillation_loss, pretrained_config, sequence_logprobs

LOSSES = dict(distillation=distillation_loss, attention=attention_loss)
Rows = list[tuple[int, int]]  # tokens of the prompt and of the whole row, for each row


@dataclass(frozen=True)
class Case:
    """One training step. `rows` holds a list for each rank, and in it the rows of each of its micro-batches."""

    rows: list[list[Rows]]
    loss: str
    checkpointing: bool
    config: dict[str, Any]

    @property
    def all_rows(self) -> Rows:
        return [row for of_rank in self.rows for of_batch in of_rank for row in of_batch]


def batch(rows: Rows) -> dict[str, torch.Tensor]:
    """Right-padded; a row's tokens depend on its lengths only, so that a row is the same in any batch."""
    width = max(end for _, end in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (start, end) in enumerate(rows):
        ids[row, :end] = torch.randint(3, 61, (end,), generator=torch.Generator().manual_seed(97 * start + end))
        mask[row, :end] = 1
        labels[row, start:end] = ids[row, start:end]
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def loss_of(model: nn.Module, rows: Rows, case: Case) -> torch.Tensor:
    """Divided by the number of thoughts of the whole step, so that the losses of its parts add up."""
    inputs, total = batch(rows), sum(end - start for start, end in case.all_rows)
    if case.loss == "labels":
        return model(**inputs, num_items_in_batch=total).loss
    del inputs["labels"]
    if case.loss in LOSSES:
        starts = torch.tensor([start for start, _ in rows])
        return LOSSES[case.loss](model, **inputs, prompt_lengths=starts, num_items_in_batch=total)
    logprobs, _ = sequence_logprobs(model, **inputs, prompt_lengths=torch.tensor([start for start, _ in rows]))
    return -logprobs.sum() / total


def build(case: Case) -> nn.Module:
    model = with_adapter(tiny_model("llama"), **(dict(window_size=6, eviction_ratio=0.5) | case.config)).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def ddp_step(model: nn.Module, batches: list[Rows], case: Case) -> nn.Module:
    """All micro-batches as accelerate runs them; returns the wrapped model."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    wrapped = accelerator.prepare_model(model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    for rows in batches:
        with accelerator.accumulate(wrapped):  # divides by their number, and averages over processes
            accelerator.backward(loss_of(wrapped, rows, case) * len(batches) * dist.get_world_size())
    return wrapped


def shard(model: nn.Module) -> None:
    """As accelerate does it on GPUs (on the CPU it does not): each layer, then the rest."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)


def fsdp2_step(model: nn.Module, batches: list[Rows], case: Case) -> nn.Module:
    """As `ddp_step`, on a sharded model."""
    shard(model)
    for number, rows in enumerate(batches, start=1):
        model.set_requires_gradient_sync(number == len(batches))
        (loss_of(model, rows, case) * dist.get_world_size()).backward()
    return model


STEPS = dict(ddp=ddp_step, fsdp2=fsdp2_step)


def results(strategy: str, case: Case) -> dict[str, torch.Tensor]:
    """The gradients that this rank's optimizer would see, by parameter, and the loss of the step without gradients."""
    model, batches = build(case), case.rows[dist.get_rank()]
    wrapped = STEPS[strategy](model, batches, case)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    with torch.no_grad():
        found["loss"] = sum(loss_of(wrapped, rows, case) for rows in batches)
    dist.all_reduce(found["loss"])
    return found


def generate(rank: int, world: int, folder: Path, prompts: list[tuple[int, int]]) -> None:
    """One process that generates from its own prompt on a sharded model, with as many steps as the others."""
    with group(rank, world, folder):
        model = with_adapter(tiny_model("llama"), window_size=6, eviction_ratio=0.5)
        inputs = batch([prompts[rank]])
        del inputs["labels"]
        options = dict(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
        expected = model.generate(**options)
        shard(model)
        try:
            model.generate(**options)
            refused = ""
        except RuntimeError as error:
            refused = str(error)
        register_fsdp_forward_method(model, "generate")
        torch.save((expected, model.generate(**options), refused), folder / f"results-{rank}.pt")


def configure(rank: int, world: int, folder: Path) -> None:
    """One process whose base is not quite that of the others."""
    with group(rank, world, folder):
        base = tiny_model("llama")
        for parameter in base.parameters():
            parameter.data *= 1 + rank / 10
        torch.save(pretrained_config(base).alpha_pattern, folder / f"results-{rank}.pt")


def work(rank: int, world: int, folder: Path, strategy: str, cases: list[Case]) -> None:
    """One process."""
    with group(rank, world, folder):
        for number, case in enumerate(cases):
            print(case, flush=True)
            torch.save(results(strategy, case), folder / f"results-{number}-{rank}.pt")

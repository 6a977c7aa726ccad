"""What each process of test_deepspeed.py runs: steps on one rank's rows under ZeRO-3, on the CPU with gloo."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_jobs import Case, Rows, batch, build, loss_of
from processes import group
from torch import nn

from peft_pte import sequence_logprobs
from peft_pte.replay import chunks

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; the batches are ours
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # small parameters are sharded too
    "gradient_clipping": 0.0,  # its default is 1
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled
}


def single_precision(case: Case) -> nn.Module:
    """DeepSpeed would make float64 models float32 on its own."""
    return build(case).float()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Without adaptive scaling, which would make the rounding of small gradients large."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(steps: list[Case], folder: Path) -> dict[str, list]:
    """One step of the optimizer for each case, then everything without gradients; saves the adapter.

    Returns:
        `losses` of the joined batches; of this rank's last rows, the `logprobs` with and without the adapter, and
        `generated` tokens.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an operation for all-reduce that it would compile
    model = single_precision(steps[0])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=CONFIG)
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in model.parameters())  # sharded
    losses = []
    for case in steps:
        (rows,) = case.rows[dist.get_rank()]
        loss = loss_of(engine, rows, case)
        engine.backward(loss * dist.get_world_size())  # gradients are averaged over processes
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
    return dict(losses=losses) | without_gradients(engine, rows, synced_gpus=True)


def without_gradients(model: nn.Module, rows: Rows, **options) -> dict[str, list]:
    """What `train` says, of a model that may be wrapped; the prompt of the first row is gone on with."""
    inputs = batch(rows)
    del inputs["labels"]
    peft_model = getattr(model, "module", model).eval()
    inputs["prompt_lengths"] = [start for start, _ in rows]
    with torch.no_grad():
        logprobs = [sequence_logprobs(model, **inputs)[0]]
        with peft_model.disable_adapter():
            logprobs.append(sequence_logprobs(model, **inputs)[0])
    peft_model.peft_config["default"].window_size = "prompt"  # so that ranks evict at different steps
    start, end = rows[0]
    prompt = inputs["input_ids"][:1, :start]
    generated = peft_model.generate(input_ids=prompt, max_length=end, do_sample=False, eos_token_id=None, **options)
    return dict(logprobs=logprobs, generated=[generated])


def work(rank: int, world: int, folder: Path, steps: list[Case]) -> None:
    """One process."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    chunks.CHUNK_TOKENS = 16  # several calls of the head a segment, and not as many on each rank
    with group(rank, world, folder):
        torch.save(train(steps, folder / "adapter"), folder / f"results-{rank}.pt")

"""A training run in its own process, which stops and waits at a chosen moment: see test_interruption.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from models import tiny_model
from peft import get_peft_model
from test_training import PTE, Recall, losses
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import peft_pte.checkpoints
from peft_pte.checkpoints import AtomicCheckpoints

# Step 6 is the second save (of four); with a limit of two the third one, step 9, deletes the first.
MOMENTS = ["training", "adapter", "optimizer", "rename", "rotation"]


class AtomicTrainer(AtomicCheckpoints, Trainer):
    pass


def wait(folder: Path) -> None:
    """Tell the test that the moment has come, and wait to be killed."""
    (folder / "ready").touch()
    time.sleep(600)


def stop_at(moment: str, folder: Path, trainer: Trainer) -> None:
    """Make the process wait in the middle of what `moment` names."""

    def instead(
        owner: Any, name: str, step: int, before: Callable[..., None] = lambda *args, **kwargs: None, which: str = ""
    ) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step and which in str(args[:1]):
                before(*args, **kwargs)
                wait(folder)
            return original(*args, **kwargs)

        setattr(owner, name, replacement)

    def half_a_file(tensors: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(b"\x00" * 100)

    if moment == "training":
        instead(trainer, "training_step", 7)
    elif moment == "adapter":
        instead(peft.peft_model, "safe_save_file", 6, half_a_file)
    elif moment == "optimizer":
        instead(trainer, "_save_optimizer_and_scheduler", 6)
    elif moment == "rename":
        instead(peft_pte.checkpoints.os, "rename", 6)
    elif moment == "rotation":
        instead(peft_pte.checkpoints.shutil, "rmtree", 9, which="old-checkpoint-3")


def main(folder: Path, moment: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=12,
        save_steps=3,
        save_total_limit=2,
        logging_steps=1,
        gradient_checkpointing=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = AtomicTrainer(get_peft_model(tiny_model("llama", torch.float32), PTE), arguments, train_dataset=Recall())
    stop_at(moment, folder, trainer)
    last = get_last_checkpoint(folder / "run") if (folder / "run").exists() else None
    trainer.train(resume_from_checkpoint=last)
    torch.save(dict(losses=losses(trainer), weights=trainer.model.state_dict()), folder / "result.pt")

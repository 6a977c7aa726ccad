"""What the processes of test_interruption.py run: a `Trainer` script that stops where it is to be killed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import tiny_model, with_adapter
from processes import group
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_pte.trainers.checkpoints import AtomicCheckpoints


class Digits(torch.utils.data.Dataset):
    """Random sequences with a prompt of four tokens."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 20, (18,), generator=torch.Generator().manual_seed(index))
        return dict(input_ids=ids, labels=torch.where(torch.arange(18) < 4, -100, ids))


class AtomicTrainer(AtomicCheckpoints, Trainer):
    pass


def make(folder: Path, cls: type[Trainer] = AtomicTrainer, **options: Any) -> Trainer:
    """A run of 8 steps that saves every second one; dropout, so that the random state has to come back too."""
    model = with_adapter(tiny_model("llama", torch.float32), window_size=6, pte_dropout=0.2)
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=8,
        save_steps=2,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return cls(model, TrainingArguments(**(settings | options)), train_dataset=Digits(), eval_dataset=Digits())


def losses(state: TrainerState) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}


# ------------------------------------------------------------------------------------- moments at which a run is killed


def torn(write: Callable[..., Any], path_of: Callable[..., str], name: str, stop: Callable[[], None]) -> Any:
    """`write`, stopped when half of the file `name` is written."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        path = path_of(*args, **kwargs)
        if Path(path).name == name:
            os.truncate(path, os.path.getsize(path) // 2)
            stop()
        return result

    return wrapper


def at_rename(before: bool, stop: Callable[[], None]) -> Callable[..., None]:
    rename = os.rename

    def wrapper(source: Any, target: Any) -> None:
        if before:
            stop()
        rename(source, target)
        stop()

    return wrapper


def at_removal(stop: Callable[[], None]) -> Callable[..., None]:
    """`shutil.rmtree`, stopped when the largest file is gone."""

    def wrapper(folder: Any, *args: Any, **kwargs: Any) -> None:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        if files:
            max(files, key=lambda path: path.stat().st_size).unlink()
            stop()

    return wrapper


MOMENTS: dict[str, Callable[[Callable[[], None]], Any]] = {
    "in the adapter": lambda stop: patch(
        "peft.peft_model.safe_save_file",
        torn(peft_save_file(), lambda tensors, path, **_: path, "adapter_model.safetensors", stop),
    ),
    "in the optimizer": lambda stop: patch(
        "torch.save", torn(torch.save, lambda content, path: path, "optimizer.pt", stop)
    ),
    "in the trainer's state": lambda stop: patch.object(
        TrainerState, "save_to_json", torn(TrainerState.save_to_json, lambda _, path: path, "trainer_state.json", stop)
    ),
    "before the folder gets its name": lambda stop: patch("os.rename", at_rename(True, stop)),
    "after the folder has got its name": lambda stop: patch("os.rename", at_rename(False, stop)),
    "in the removal of an old checkpoint": lambda stop: patch("shutil.rmtree", at_removal(stop)),
    "between checkpoints": lambda stop: contextlib.nullcontext(),
}


def peft_save_file() -> Callable[..., Any]:
    from peft import peft_model

    return peft_model.safe_save_file


@contextlib.contextmanager
def stopping(moment: str, ready: Path) -> Iterator[None]:
    """At the moment, say so by a file and wait to be killed."""

    def stop() -> None:
        ready.touch()
        time.sleep(600)

    with MOMENTS[moment](stop):
        yield
        if moment == "between checkpoints":
            stop()


class Interrupted(AtomicTrainer):
    """Stops when the third checkpoint is saved, at which the first one is removed, or in the step after it."""

    moment: str
    ready: Path

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        third = self.state.global_step == 6 and self.moment != "between checkpoints"
        with stopping(self.moment, self.ready) if third else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 6 and self.moment == "between checkpoints":
            with stopping(self.moment, self.ready):
                pass
        return loss


def run_interrupted(folder: Path, moment: str, ready: Path) -> None:
    torch.set_num_threads(1)
    trainer = make(folder, Interrupted)
    trainer.moment, trainer.ready = moment, ready
    trainer.train()


def save_interrupted(folder: Path, ready: Path) -> None:
    """`save_model` over an older adapter."""
    torch.set_num_threads(1)
    trainer = make(folder.parent)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    with stopping("in the adapter", ready):
        trainer.save_model(str(folder))


# ------------------------------------------------------------------------------------------------------ two processes


class SlowSecond(AtomicTrainer):
    """The second process takes long to write its part of a checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        time.sleep(0.5 * self.args.process_index)
        super()._save_rng_state(output_dir)


class Seen(TrainerCallback):
    """Notes what is in each checkpoint as soon as a process goes on."""

    def __init__(self) -> None:
        self.files: list[set[str]] = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.files.append(set(os.listdir(Path(args.output_dir) / f"checkpoint-{state.global_step}")))


def run_process(rank: int, world: int, folder: Path) -> None:
    with group(rank, world, folder):
        trainer, seen = make(folder / "run", SlowSecond, max_steps=4, save_steps=1), Seen()
        trainer.add_callback(seen)
        trainer.train()
        torch.save(seen.files, folder / f"seen-{rank}.pt")

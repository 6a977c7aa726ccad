"""A training run that is killed at any moment goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interruption_jobs import (
    MOMENTS,
    AtomicTrainer,
    losses,
    make,
    run_interrupted,
    run_process,
    save_interrupted,
)
from models import tiny_model
from peft import PeftModel
from processes import TIMEOUT, run_group, start
from transformers import Trainer

from peft_pte import PTEConfig
from peft_pte.trainers.checkpoints import STAGING, AtomicCheckpoints


def kill_when_ready(process: BaseProcess, ready: Path) -> None:
    """SIGKILL as soon as the process says that it is where it is to be killed."""
    deadline = time.monotonic() + TIMEOUT
    while not ready.exists() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    reached, code = ready.exists(), process.exitcode
    process.kill()
    process.join()
    assert reached, f"the process did not get there; exit code {code}"


def steps_on_disk(folder: Path) -> set[int]:
    """The steps of all checkpoints; each of them must be complete."""
    for checkpoint in folder.glob("checkpoint-*"):
        PeftModel.from_pretrained(tiny_model("llama", torch.float32), checkpoint)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert checkpoint.name == f"checkpoint-{state['global_step']}"
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.load(checkpoint / name, weights_only=False)
    return {int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in folder.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make(tmp_path_factory.mktemp("uninterrupted"), Trainer)
    trainer.train()
    return trainer


def test_a_finished_run_is_resumed_as_it_was(tmp_path: Path, uninterrupted: Trainer) -> None:
    """Behind the last step nothing is trained; with more steps to go the run goes on."""
    trainer = make(tmp_path)
    trainer.train()
    resumed = make(tmp_path)
    assert resumed.train(resume_from_checkpoint=True).global_step == 8
    assert losses(resumed.state) == losses(uninterrupted.state)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())
    resumed.save_model()
    further = make(tmp_path)
    further.args.max_steps = 9
    assert further.train(resume_from_checkpoint=True).global_step == 9


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_goes_on(moment: str, tmp_path: Path, uninterrupted: Trainer) -> None:
    """Killed while the checkpoint of step 6 is saved, or after it: all checkpoints on the disk are complete, and the
    losses and weights after resuming from the last one are those of a run that was not killed, bit for bit."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    kill_when_ready(start(run_interrupted, folder, moment, ready), ready)
    renamed = moment.startswith(("after", "between", "in the removal"))
    assert max(steps_on_disk(folder)) == (6 if renamed else 4)
    assert (folder / STAGING).exists() == (moment != "between checkpoints")
    resumed = make(folder)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed.state) == losses(uninterrupted.state) and len(losses(resumed.state)) == 8
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in uninterrupted.model.state_dict().items())
    assert steps_on_disk(folder) == {6, 8}
    assert not (folder / STAGING).exists()


def test_model_saved_over_an_older_one(tmp_path: Path) -> None:
    """Killed in between, the older adapter is still there; else the new one is, and the model card is kept."""
    folder, ready = tmp_path / "adapter", tmp_path / "ready"
    trainer = make(tmp_path)
    trainer.save_model(str(folder))
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    kill_when_ready(start(save_interrupted, folder, ready), ready)

    def saved_equals_trained() -> bool:
        loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32), folder).state_dict()
        return all(torch.equal(loaded[name], tensor) for name, tensor in trainer.model.state_dict().items())

    assert saved_equals_trained()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert not saved_equals_trained()
    trainer.save_model(str(folder))
    assert saved_equals_trained()
    assert "Written by hand." in card.read_text()
    assert not (folder / STAGING).exists()


def scripted(base: type[Trainer]) -> type[Trainer]:
    """A trainer whose evaluation loss is lowest at the second step."""

    class Scripted(base):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": abs(self.state.global_step - 2.5)}
            self.log(metrics)
            return metrics

    return Scripted


@pytest.mark.parametrize("limit", [1, 2, None])
@pytest.mark.parametrize("load_best", [False, True])
def test_rotation_and_best_checkpoint_as_in_the_plain_trainer(
    limit: int | None, load_best: bool, tmp_path: Path
) -> None:
    runs = []
    for base in (Trainer, AtomicTrainer):
        folder = tmp_path / "run"  # the same, since paths are part of what is compared
        trainer = make(
            folder,
            scripted(base),
            max_steps=4,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=limit,
            metric_for_best_model="eval_loss",
            load_best_model_at_end=load_best,
        )
        trainer.train()
        states = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/trainer_state.json")}
        files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        model = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        runs.append((states, files, model, trainer.state.best_model_checkpoint))
        shutil.rmtree(folder)
    plain, atomic = runs
    assert plain[0] == atomic[0] and plain[1] == atomic[1] and plain[3] == atomic[3]
    assert plain[3] == str(folder / "checkpoint-2") and "checkpoint-2" in plain[0]
    assert all(torch.equal(parameter, atomic[2][name]) for name, parameter in plain[2].items())


def test_checkpoint_of_an_abandoned_branch_is_replaced(tmp_path: Path) -> None:
    """Resumed from further back, a run writes checkpoints that are there already."""
    make(tmp_path, save_total_limit=None, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "old").touch()
    resumed = make(tmp_path, save_total_limit=None, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-4" / "old").exists() and not (tmp_path / STAGING).exists()
    assert steps_on_disk(tmp_path) == {2, 4}


def test_checkpoint_waits_for_all_processes(tmp_path: Path) -> None:
    """It gets its name when the slowest process has written its part, and every process sees it when it goes on."""
    run_group(2, run_process, tmp_path)
    for rank in range(2):
        seen = torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False)
        assert len(seen) == 4
        assert all({"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors"} <= files for files in seen)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_order_of_base_classes() -> None:
    with pytest.raises(TypeError, match="name AtomicCheckpoints before the Trainer"):

        class Wrong(Trainer, AtomicCheckpoints):
            pass


def test_uploads_come_from_the_complete_checkpoint(tmp_path: Path) -> None:
    trainer, uploaded = make(tmp_path, max_steps=2), []
    trainer.args.push_to_hub = True
    with patch.object(Trainer, "_push_from_checkpoint", lambda self, path: uploaded.append((path, os.listdir(path)))):
        trainer.train()
    ((path, files),) = uploaded
    assert path == str(tmp_path / "checkpoint-2") and {"trainer_state.json", "adapter_model.safetensors"} <= set(files)


def test_trainers_of_trl(tmp_path: Path) -> None:
    """They extend the saving of checkpoints; some add a file of their own to what has been saved."""
    import trl
    from test_trl import COMMON, PTE, base_model, datasets, tokenizer

    class Extended(trl.SFTTrainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (checkpoint / "own.json").write_text("{}")

    class AtomicSFT(AtomicCheckpoints, Extended):
        pass

    rows = [dict(prompt="w5 w6 w7", completion=" ".join(f"w{8 + (i + j) % 4}" for j in range(12))) for i in range(16)]
    trainer = AtomicSFT(
        model=base_model(),
        processing_class=tokenizer(),
        args=trl.SFTConfig(output_dir=str(tmp_path), save_steps=1, **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**PTE),
    )
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "checkpoint-1", "checkpoint-2"}
    for step in steps_on_disk(tmp_path):
        assert (tmp_path / f"checkpoint-{step}" / "own.json").exists()

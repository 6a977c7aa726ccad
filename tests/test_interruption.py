"""kill -9 at any moment: no broken adapter on the disk, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from interrupted_run import MOMENTS, AtomicTrainer, main
from models import tiny_model
from peft import PeftModel, get_peft_model
from test_training import PTE, Recall, trainer
from transformers import TrainingArguments

# Children are forked from a process that has imported everything.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["interrupted_run"])


def start(folder: Path, moment: str) -> multiprocessing.Process:
    run = PROCESSES.Process(target=main, args=(folder, moment))
    run.start()
    return run


def finish(folder: Path, moment: str) -> dict:
    run = start(folder, moment)
    run.join(timeout=300)
    assert run.exitcode == 0
    return torch.load(folder / "result.pt")


def assert_every_checkpoint_loads(run: Path) -> list[str]:
    names = sorted(path.name for path in run.glob("checkpoint-*"))
    for name in names:
        model = PeftModel.from_pretrained(tiny_model("llama", torch.float32), run / name)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert json.loads((run / name / "trainer_state.json").read_text())["global_step"] == int(name.split("-")[1])
        assert (run / name / "optimizer.pt").stat().st_size > 1000
    return names


def test_killed_and_resumed(tmp_path: Path) -> None:
    """At each moment of training and of saving."""
    (tmp_path / "whole").mkdir()
    whole = finish(tmp_path / "whole", "never")
    assert assert_every_checkpoint_loads(tmp_path / "whole" / "run") == ["checkpoint-12", "checkpoint-9"]
    for moment in MOMENTS:
        folder = tmp_path / moment
        folder.mkdir()
        run = start(folder, moment)
        deadline = time.time() + 300
        while not (folder / "ready").exists():
            assert run.is_alive() and time.time() < deadline
            time.sleep(0.05)
        run.kill()
        run.join()
        names = assert_every_checkpoint_loads(folder / "run")
        expected = dict(training=["checkpoint-3", "checkpoint-6"], rotation=["checkpoint-6", "checkpoint-9"])
        assert names == expected.get(moment, ["checkpoint-3"]), moment
        resumed = finish(folder, "never")
        assert resumed["losses"] == whole["losses"], moment
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), (moment, name)
        assert sorted(os.listdir(folder / "run")) == ["checkpoint-12", "checkpoint-9"]


def test_an_adapter_is_replaced_only_by_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_model` over a good adapter, failing half-way; its model card is carried on."""
    run = trainer(PTE, tmp_path / "run", AtomicTrainer)
    run.save_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "README.md").write_text((tmp_path / "adapter" / "README.md").read_text() + "\nMine.\n")
    good = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fail(tensors: dict, path: str, **kwargs: object) -> None:
        Path(path).write_bytes(b"\x00" * 100)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            run.save_model(str(tmp_path / "adapter"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == good
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != good["adapter_model.safetensors"]
    assert "Mine." in (tmp_path / "adapter" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == good.keys()


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = get_peft_model(tiny_model("llama", torch.float32), PTE)
    run = AtomicTrainer(model, arguments, train_dataset=Recall(), eval_dataset=Recall(8))
    evaluate = run.evaluate
    scores = iter([1.0, 3.0, 2.0])  # the first checkpoint is the best
    run.evaluate = functools.wraps(evaluate)(lambda *args, **kwargs: scored(run, next(scores)))
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert assert_every_checkpoint_loads(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    best = PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path / "checkpoint-2")
    for (name, a), b in zip(best.named_parameters(), run.model.parameters()):
        assert torch.equal(a, b), name


def scored(run: AtomicTrainer, loss: float) -> dict[str, float]:
    metrics = {"eval_loss": loss}
    run.control = run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
    return metrics

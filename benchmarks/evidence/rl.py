"""GRPO on a task under the tight window, from a short supervised start: does RL reach what is only in the state?

The stream up to its first answer is the prompt, of which nothing is kept but the first tokens that say nothing; the
rest goes through the window as thoughts do. The completion is the answer, and the reward is 1 if it is right.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from arms import ARMS, Arm
from peft_pte.trainers.grpo import PTEGRPOTrainer
from streams import SymbolTask, Task
from training import Settings, adapted, evaluate, supervised

RL_ARMS = ["LoRA, windowed", "Global-only", "PTE, paper (sum, norm on write)", "PTE"]
EVALUATE_EVERY = 25
GRPO = dict(
    max_steps=150,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    per_device_train_batch_size=128,
    num_generations=8,
)
QUICK_GRPO = dict(max_steps=2, per_device_train_batch_size=16)
START_STEPS = 50


class Evaluation(TrainerCallback):
    """Greedy accuracy on the held-out streams, every few steps."""

    def __init__(self, settings: Settings, arm: Arm):
        self.settings, self.arm, self.rows = settings, arm, []

    def add(self, model: torch.nn.Module, step: int) -> None:
        self.rows += [dict(row, step=step, reward="") for row in evaluate(model, self.settings, self.arm)]

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step % EVALUATE_EVERY == 0 or state.global_step == args.max_steps:
            self.add(model, state.global_step)
            model.train()


def tokenizer_of(task: Task, base: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's. Of symbols a word is a token's number, but for padding and end, else found in words."""
    if not isinstance(task, SymbolTask):
        return AutoTokenizer.from_pretrained(base, padding_side="left")
    words = {"<end>": 0} | {str(i): i for i in range(1, task.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", eos_token="<end>", padding_side="left")


def problems(settings: Settings, tokenizer: PreTrainedTokenizerBase, size: int, seed: int) -> Dataset:
    """Streams up to the first scored answer, over all trained distances.

    TRL reads prompts as text, so a stream that would be split into other tokens than it has is drawn again.
    """
    generator = torch.Generator().manual_seed(100_000 + seed)  # neither those of the start nor the held-out ones
    rows: list[dict[str, str]] = []
    one = replace(settings, batch_size=1)
    for _ in range(20 * size):
        stream = one.batch(generator)
        ids, columns = stream.input_ids[0], stream.scored[0].nonzero()[:, 0]
        before = ids[: columns[0]]
        row = dict(prompt=tokenizer.decode(before), answer=tokenizer.decode(ids[columns]))
        if tokenizer(row["prompt"])["input_ids"] == before.tolist():
            rows.append(row)
        if len(rows) == size:
            return Dataset.from_list(rows)
    raise ValueError(f"{settings.task}: the tokenizer hardly ever splits a stream's text as the stream is written.")


def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(said == right) for said, right in zip(completions, answer)]


def run_rl(name: str, seed: int, settings: Settings, grpo: dict[str, Any]) -> list[dict[str, Any]]:
    """One arm: a row with the reward of each step, and rows with accuracies on the way (step 0: after the start)."""
    start, task = time.time(), settings.streams
    tokenizer = tokenizer_of(task, settings.base)
    groups = grpo["max_steps"] * grpo["per_device_train_batch_size"] // grpo["num_generations"]
    train_dataset = problems(settings, tokenizer, groups, seed)
    with ARMS[name].variant(), tempfile.TemporaryDirectory() as output:
        model = adapted(ARMS[name], settings, seed, retained_prefix=task.prompt_length)
        for _ in supervised(model, settings, seed, ARMS[name]):
            pass
        evaluation = Evaluation(settings.two_distances, ARMS[name])
        evaluation.add(model, 0)
        arguments = GRPOConfig(
            output_dir=output,
            max_completion_length=len(tokenizer(train_dataset[0]["answer"])["input_ids"]),
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=settings.device == "cpu",
            seed=seed,
            **grpo,
        )
        trainer = PTEGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=arguments,
            train_dataset=train_dataset,
            callbacks=[evaluation],
        )
        trainer.train()
    nothing = dict.fromkeys(("control", "distance", "evictions", "accuracy", "nll"), "")
    rewards = [
        nothing | dict(step=entry["step"], reward=round(entry["reward"], 4))
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    about = dict(arm=name, seed=seed, seconds=round(time.time() - start), start_steps=settings.steps, **grpo)
    return [about | row for row in evaluation.rows + rewards]

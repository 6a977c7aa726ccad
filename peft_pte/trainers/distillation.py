"""A warm start without labels or rewards: the base model with its full cache teaches the bounded policy.

An ordinary `transformers.Trainer` whose loss is `distillation_loss`; see docs/distillation.md.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import SequentialLR
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.utils import logging

from ..hooks.window import window
from ..replay.distillation import (
    Divergence,
    Divergences,
    adapter_off,
    compared_columns,
    policy_of,
    sequence_divergence,
    teacher_states,
)
from ..replay.heads import attachment_in
from ..replay.segments import Watch, watched
from ..replay.transfer import attention_loss
from .checkpoints import AtomicCheckpoints
from .rows import Completions, Row, row_of

logger = logging.get_logger(__name__)


@dataclass
class PTEDistillationConfig(TrainingArguments):
    """`TrainingArguments`, with those of `PTEDistillationTrainer`.

    Args:
        window_sizes (`list[int]`, *optional*):
            The smallest and the largest window. Each step draws one between them (both included), the same in all
            processes and again after resuming. By default the configuration's own.
        divergence (`"forward"`, `"reverse"` or `"mixed"`): As in `peft_pte.sequence_divergence`.
        temperature (`float`): The logits of both sides are divided by it.
        only_after_eviction (`bool`): Learn only from tokens that are predicted when thoughts have left.
        attention_steps (`int`):
            So many first steps learn by `peft_pte.attention_loss`: each layer alone, from what the base's attention
            gives. They cost a part of the others, and need no backward pass through the model. Each of both parts has
            the whole schedule of the learning rate, its warm-up included.
        max_length (`int`, *optional*): Rows are cut off after so many tokens, the prompt included.
        text_prompt_tokens (`int`):
            So many first tokens of a row of plain text count as its prompt, which never leaves: attention needs a few
            tokens to rest on (arXiv 2309.17453).
        completions_file (`str`, *optional*):
            Where completions of prompts are kept. By default `completions.jsonl` in `output_dir`.
        max_new_tokens (`int`): The longest completion.
        generation_batch_size (`int`): How many prompts are completed together.
        generation_kwargs (`dict`, *optional*): Further arguments of `generate`; the model's own by default.
    """

    window_sizes: list[int] | None = field(default=None, metadata={"help": "Smallest and largest window, drawn from."})
    divergence: str = field(default="forward", metadata={"help": "'forward', 'reverse' or 'mixed'."})
    temperature: float = field(default=1.0, metadata={"help": "The logits of both sides are divided by it."})
    only_after_eviction: bool = field(default=True, metadata={"help": "Learn only where thoughts have left."})
    attention_steps: int = field(default=0, metadata={"help": "First steps, in which each layer learns alone."})
    max_length: int | None = field(default=None, metadata={"help": "Rows are cut off after so many tokens."})
    text_prompt_tokens: int = field(default=4, metadata={"help": "First tokens of plain text that never leave."})
    completions_file: str | None = field(default=None, metadata={"help": "Where completions of prompts are kept."})
    max_new_tokens: int = field(default=1024, metadata={"help": "The longest completion."})
    generation_batch_size: int = field(default=8, metadata={"help": "Prompts that are completed together."})
    generation_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Arguments of `generate`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # the model's forward knows none of ours

        def refuse(name: str, advice: str) -> None:
            raise ValueError(f"PTEDistillationConfig: `{name}` is {getattr(self, name)!r}, but must be {advice}.")

        sizes = self.window_sizes
        if sizes is not None and not (
            len(sizes) == 2 and all(type(x) is int for x in sizes) and 0 < sizes[0] <= sizes[1]
        ):
            refuse("window_sizes", "[smallest, largest], two positive integers, or None")
        if self.divergence not in get_args(Divergence):
            refuse("divergence", f"one of {', '.join(map(repr, get_args(Divergence)))}")
        if not self.temperature > 0:
            refuse("temperature", "a positive number")
        least_of = dict(
            text_prompt_tokens=0, max_new_tokens=1, generation_batch_size=1, max_length=2, attention_steps=0
        )
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                refuse(name, f"an integer >= {least}")


@dataclass
class Collator:
    """Rows as right-padded tensors: `input_ids` and `attention_mask` [B, T], `prompt_lengths` [B]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = [torch.ones_like(row) for row in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return dict(
            input_ids=pad(ids, batch_first=True, padding_value=self.pad_token_id),
            attention_mask=pad(mask, batch_first=True),
            prompt_lengths=torch.tensor([row["prompt_length"] for row in rows]),
        )


# By name what is logged, as [sum, count] of each batch; on the device, so that no step waits.
Sums = dict[str, list[torch.Tensor]]


def note(sums: Sums, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
    sums.setdefault(name, []).append(torch.stack([x.detach().float().to(total.device) for x in (total, count)]))


class PTEDistillationTrainer(AtomicCheckpoints, Trainer):
    """`transformers.Trainer` for a model with a PTE adapter: the student is the policy under the bounded cache, the
    teacher the base model with its full cache. No labels, no rewards.

    A row is one of

    - `text`: plain text;
    - `prompt` and `completion`: strings, or lists of messages;
    - `messages`: a conversation whose last message, the assistant's, is what is learned;
    - `prompt` alone, or `messages` that end with the user: before training the base model completes them under its full
      cache. Each completion is a line in `completions_file` as soon as it is made, and a run that was killed goes on
      with the next.

    Logged, beside the loss: `kl`, KL(teacher || student) a token; on the steps that log, `kl_windowed_base`, the same
    of the base model under the same window, and `gap_closed`, 1 - kl / kl_windowed_base of these batches; `evictions` a
    row, `state_norm` (Frobenius, of the last states, the mean over layers and rows) and `window`. An evaluation logs
    them too, under the configuration's window. In the first `attention_steps` there is `attention_error` instead, which
    is the loss.

    Checkpoints are complete or not there (`AtomicCheckpoints`), and resuming draws the windows that would have come.

    Args:
        model: with a PTE adapter (`get_peft_model(base, PTEConfig(...))`).
        args: `PTEDistillationConfig`.
        train_dataset: rows, in anything that can be iterated.
        eval_dataset: the same; also several of them, by name.
        processing_class: the tokenizer.
        kwargs: as of `Trainer`.

    Raises:
        ValueError: the model has no PTE adapter, there is no tokenizer, a row is of no kind, no row is longer than the
            smallest window, or prompts are to be completed by a sharded model.
    """

    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: PTEDistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        attachment_in(model)  # which refuses a model without an adapter
        if processing_class is None:
            raise ValueError("`processing_class` is None, but rows of text need the model's tokenizer.")
        pad = processing_class.pad_token_id
        kwargs.setdefault("data_collator", Collator(0 if pad is None else pad))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of a whole step, see below
        self._sums: dict[bool, Sums] = {True: {}, False: {}}  # of training, of an evaluation

        def prepared(rows: Any) -> Any:
            if isinstance(rows, dict):
                return {name: self.prepare_rows(part) for name, part in rows.items()}
            return None if rows is None else self.prepare_rows(rows)

        self.train_dataset, self.eval_dataset = prepared(train_dataset), prepared(eval_dataset)
        self._refuse_short_rows()

    # ------------------------------------------------------------------------------------------------------------ rows

    def prepare_rows(self, rows: Any) -> list[dict[str, Any]]:
        """Rows as `input_ids` and `prompt_length`, completed where there is only a prompt, and cut to `max_length`."""
        tokenizer, args = self.processing_class, self.args
        encoded = [row_of(row, tokenizer, args.text_prompt_tokens) for row in rows]
        prompts = [row.prompt for row in encoded if row.completion is None]
        if prompts:
            made = iter(self._complete(prompts))
            encoded = [row if row.completion is not None else Row(row.prompt, next(made)) for row in encoded]
        kept = []
        for row in encoded:
            ids = (row.prompt + (row.completion or []))[: args.max_length]
            if len(ids) > len(row.prompt):
                kept.append(dict(input_ids=ids, prompt_length=len(row.prompt)))
        if len(kept) < len(encoded):
            logger.warning(f"{len(encoded) - len(kept)} of {len(encoded)} rows have no completion and are left out.")
        return kept

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's, also for rows that `evaluate` is given."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            known = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            if not any(eval_dataset is rows for rows in known):
                eval_dataset = self.prepare_rows(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        args = self.args
        path = Path(args.completions_file or Path(args.output_dir) / "completions.jsonl")
        options = dict(max_new_tokens=args.max_new_tokens, seed=args.seed) | (args.generation_kwargs or {})
        store = Completions(path, options, args.process_index, args.world_size)
        base, known = self.model, store.read()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = str(getattr(base.config, "_name_or_path", ""))
            if any(store.key(name, prompt) not in known for prompt in prompts):
                raise ValueError(
                    f"{len(prompts)} rows are prompts only, and not all of their completions are in {path}: a sharded "
                    "model cannot make them here. Build the trainer once without FSDP and DeepSpeed; it keeps them."
                )
        else:
            store.make(base, self.processing_class, prompts, args.generation_batch_size, bool(args.disable_tqdm))
            self.accelerator.wait_for_everyone()
        return store.of(base, prompts)

    def _refuse_short_rows(self) -> None:
        rows, policy = self.train_dataset, policy_of(self.model)
        smallest = self.args.window_sizes[0] if self.args.window_sizes else policy.window_size
        if not rows or not self.args.only_after_eviction or smallest == "prompt":
            return
        longest = max(len(row["input_ids"]) - policy.prefix(row["prompt_length"]) for row in rows)
        if longest <= smallest + 1:
            raise ValueError(
                f"No row has more than {longest} tokens after what stays in the cache, so nothing is learned under a "
                f"window of {smallest}: choose smaller `window_sizes`, longer rows (`max_length`, `max_new_tokens`), "
                "or `only_after_eviction=False`."
            )

    # ------------------------------------------------------------------------------------------------------------ loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's, once for the steps in which each layer learns alone, and once for the others."""
        first = self.args.attention_steps
        follows_metrics = self.args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if self.lr_scheduler is not None or follows_metrics or not 0 < first < num_training_steps:
            return super().create_scheduler(num_training_steps, optimizer)
        parts = []
        for steps in (first, num_training_steps - first):
            parts.append(super().create_scheduler(steps, optimizer))
            self.lr_scheduler = None
        self.lr_scheduler = SequentialLR(optimizer or self.optimizer, parts, milestones=[first])
        return self.lr_scheduler

    def window_size(self) -> int | None:
        """The window of the present step, drawn anew for each; None: the configuration's."""
        if self.args.window_sizes is None:
            return None
        return random.Random(f"{self.args.seed} {self.state.global_step}").randint(*self.args.window_sizes)

    @contextlib.contextmanager
    def _drawn_window(self, model: nn.Module) -> Iterator[None]:
        size = self.window_size()
        with contextlib.nullcontext() if size is None else window(model, size):
            yield

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the Trainer's; the items are the tokens that are compared, in all processes, under the window drawn."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        with self._drawn_window(self.model):
            count = torch.stack([self._columns(batch).sum() for batch in batches]).sum() if batches else torch.tensor(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count.to(device)[None]).sum()
        return batches, count.clamp(min=1).to(device)

    def _columns(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        lengths, after = batch["prompt_lengths"], self.args.only_after_eviction
        return compared_columns(self.model, batch["input_ids"], batch["attention_mask"], lengths, after)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The divergence, or in the first `attention_steps` the error of attention; and what is logged of it."""
        ids, mask, lengths = inputs["input_ids"], inputs["attention_mask"], inputs["prompt_lengths"]
        args, is_training = self.args, model.training
        sums = self._sums[is_training]
        if is_training and self.state.global_step < args.attention_steps:
            with self._drawn_window(model):
                total = attention_loss(model, ids, mask, lengths, args.only_after_eviction, num_items_in_batch=1)
                count = self._columns(inputs).sum()
            note(sums, "attention_error", total, count)
            return self._answer(total, count, num_items_in_batch, return_outputs)

        def divergence(teacher: torch.Tensor) -> Divergences:
            options = args.divergence, args.temperature, args.only_after_eviction
            return sequence_divergence(model, ids, mask, lengths, *options, teacher=teacher)

        with self._drawn_window(model) if is_training else contextlib.nullcontext():
            teacher = teacher_states(model, ids, mask)
            if is_training and not self._logs_next():
                found = divergence(teacher)
            else:
                with torch.no_grad(), adapter_off(model):
                    base = divergence(teacher)
                with watched() as watch:
                    found = divergence(teacher)
                self._note(sums, found, base, watch)
        note(sums, "kl", found.kl.sum(), found.counted.sum())
        return self._answer(found.values.sum(), found.counted.sum(), num_items_in_batch, return_outputs)

    def _answer(self, total: torch.Tensor, count: torch.Tensor, num_items_in_batch: Any, return_outputs: bool) -> Any:
        """Of `compute_loss`, from the sum over `count` tokens."""
        if num_items_in_batch is None:
            loss = total / count.clamp(min=1)
        else:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = total * processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss; there are neither logits nor labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums[False].clear()  # of a prediction, which logs nothing
        return super().evaluation_loop(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------------ logs

    def _logs_next(self) -> bool:
        """Whether the present step is logged."""
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps or 1))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _note(self, sums: Sums, found: Divergences, base: Divergences, watch: Watch) -> None:
        kl, base_kl, count = found.kl.sum(), base.kl.sum(), found.counted.sum()
        note(sums, "kl_windowed_base", base_kl, count)
        note(sums, "gap_closed", base_kl - kl, base_kl)
        for name, values in dict(evictions=watch.evictions, state_norm=watch.state_norms).items():
            if values is not None:
                note(sums, name, values.sum(), torch.tensor(values.numel()))
        size = policy_of(self.model).window_size
        if size != "prompt":
            note(sums, "window", torch.tensor(size, device=kl.device), torch.tensor(1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with what has been summed up since the last time, over all processes."""
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("loss")), "train_")
        sums = self._sums[prefix == ""]
        if prefix != "train_" and sums:
            device = self.args.device
            pairs = torch.stack([torch.stack([x.to(device) for x in values]).sum(0) for values in sums.values()])
            totals = self.accelerator.gather(pairs[None]).sum(0).tolist()
            found = {name: total / count for name, (total, count) in zip(sums, totals) if count}
            logs.update({prefix + name: value for name, value in found.items()})
            sums.clear()
        super().log(logs, start_time)

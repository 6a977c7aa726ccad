"""Does the state carry thoughts? Train adapters under a tight window, and compare.

    python examples/quickstart.py                                   # offline, on 2 CPU cores, in under 5 minutes
    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct --data thoughts.jsonl --window-size 256

Without arguments a small Llama is trained from scratch, with a full cache, on a stream in which pairs of words are
written, filler follows, and then the pairs are asked for. It is frozen, and three adapters are trained under a window
that holds a third of the stream: LoRA with the same bounded cache, PTE with its global tokens only, and PTE. With
`--model` and `--data` (JSON lines with "prompt" and "completion") the same arms are trained on a checkpoint, and the
table shows the loss per token by distance past the window.

Results go to `--output`: `results.json`, `plot.png`, and the PTE adapter, which a new process loads and generates with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from peft_pte import PTECache, PTEConfig

# One bar at a time, and no notices of the libraries underneath about versions to come.
disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
# One arm has two adapters on purpose.
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")

ARMS = ("LoRA, same window", "Global-only", "PTE")
Batch = dict[str, torch.Tensor]


# --------------------------------------------------------------------------------------------------------------- tasks


class Recall:
    """prompt (4 tokens) | key value key value ... | filler | key value key value ...: the second values are asked for.

    The pairs are thoughts like the filler: they leave the window, and only the state can carry them to the queries.
    """

    PROMPT, KEYS, VALUES, FILLER = 4, 16, 16, 4
    VOCAB = 2 + KEYS + VALUES + FILLER
    metric = "accuracy of the first answer"
    retained_prefix = PROMPT  # what follows streams through the window

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.distances = {f"{i * options.filler} filler": i * options.filler for i in range(4)}

    def stream(
        self, size: int, pairs: int, filler: int, queries: int, generator: torch.Generator | None = None
    ) -> Batch:
        """`size` streams; labels only on the values that are asked for."""
        keys = torch.rand(size, self.KEYS, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(self.VALUES, (size, pairs), generator=generator)
        asked = torch.randint(pairs, (size, queries), generator=generator)
        first_value = 2 + self.KEYS

        def words(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return torch.stack([keys + 2, values + first_value], dim=2).flatten(1)

        noise = torch.randint(first_value + self.VALUES, self.VOCAB, (size, filler), generator=generator)
        prompt = torch.ones(size, self.PROMPT, dtype=torch.long)
        ids = torch.cat([prompt, words(keys, values), noise, words(keys.gather(1, asked), values.gather(1, asked))], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -2 * queries + 1 :: 2] = ids[:, -2 * queries + 1 :: 2]
        return dict(input_ids=ids, labels=labels)

    def answers(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the answers, and [size, queries]: which of them are right."""
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        asked = batch["labels"][:, 1:] != -100
        answers, logits = batch["labels"][:, 1:][asked], logits[asked]
        return F.cross_entropy(logits, answers), (logits.argmax(-1) == answers).view(len(asked), -1)

    def make_base(self, folder: Path) -> None:
        """Train a small Llama with a full cache until it answers over all distances, and save it."""
        torch.manual_seed(self.options.seed)
        config = LlamaConfig(
            vocab_size=self.VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.05,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
        longest, tail, average = 8, 100, 3.0
        full = max(self.distances.values()) + 8
        bar = tqdm(desc="base model, full cache", unit=" steps", mininterval=1)
        while tail and bar.n < 2000:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (bar.n + 1) / 20) * tail / 100
            pairs, filler = int(torch.randint(2, 9, ())), int(torch.randint(longest + 1, ()))
            loss, _ = self.answers(model, self.stream(32, pairs, filler, queries=8))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average += 0.05 * (loss.item() - average)
            if average < 0.2:  # the filler grows while the loss is small, then the rate goes to zero
                if longest < full:
                    longest = min(full, longest + 2)
                else:
                    tail -= 1
            bar.update()
            bar.set_postfix(loss=f"{average:.3f}", filler=longest, refresh=False)
        bar.close()
        model.save_pretrained(folder)

    def load_base(self, folder: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    def train_loss(self, model: torch.nn.Module) -> torch.Tensor:
        filler = int(torch.randint(2 * self.options.filler + 1, ()))
        return self.answers(model, self.stream(self.options.batch_size, self.options.pairs, filler, queries=6))[0]

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        result = {}
        for name, filler in self.distances.items():
            generator = torch.Generator().manual_seed(10_000 + filler)
            batch = self.stream(512, self.options.pairs, filler, 4, generator)
            result[name] = self.answers(model, batch)[1][:, 0].float().mean().item()
        return result

    def example(self) -> tuple[torch.Tensor, str]:
        """A stream up to its first query, and what should come next."""
        batch = self.stream(1, self.options.pairs, 2 * self.options.filler, 1, torch.Generator().manual_seed(7))
        ids = batch["input_ids"]
        return ids[:, :-1], self.show(ids[0, self.PROMPT :])

    def show(self, ids: torch.Tensor) -> str:
        names = ["_", ">", *(f"k{i}" for i in range(self.KEYS)), *(f"v{i}" for i in range(self.VALUES)), *"...."]
        return " ".join(names[i] for i in ids.tolist())


class JsonLines:
    """Prompts and completions for a real checkpoint; a tenth of the lines is held out."""

    metric = "loss per token"
    retained_prefix = "prompt"

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        rows = []
        for number, line in enumerate(Path(options.data).read_text().splitlines(), start=1):
            row = json.loads(line)
            if not {"prompt", "completion"} <= row.keys():
                raise SystemExit(f"{options.data}, line {number}: needs the fields 'prompt' and 'completion'.")
            prompt = self.tokenizer(row["prompt"]).input_ids
            completion = self.tokenizer(row["completion"], add_special_tokens=False).input_ids
            if not prompt or not completion:
                raise SystemExit(f"{options.data}, line {number}: prompt and completion must have tokens.")
            rows.append((prompt, completion[: options.max_length - len(prompt)] + [self.tokenizer.eos_token_id]))
        held_out = max(1, len(rows) // 10)
        self.held_out, self.rows = rows[:held_out], rows[held_out:] or rows
        window = options.window_size
        self.bins = [(0, window), (window, 2 * window), (2 * window, 4 * window), (4 * window, 1 << 30)]

    def make_base(self, folder: Path) -> None:
        """The checkpoint is the base."""

    def load_base(self, folder: Path) -> torch.nn.Module:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype="auto").to(device)

    def collate(self, rows: list[tuple[list[int], list[int]]], device: torch.device) -> Batch:
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for prompt, completion in rows:
            pad = length - len(prompt) - len(completion)
            batch["input_ids"].append(prompt + completion + [self.tokenizer.eos_token_id] * pad)
            batch["attention_mask"].append([1] * (length - pad) + [0] * pad)
            batch["labels"].append([-100] * len(prompt) + completion + [-100] * pad)
        return {name: torch.tensor(rows, device=device) for name, rows in batch.items()}

    def train_loss(self, model: torch.nn.Module) -> torch.Tensor:
        picked = torch.randint(len(self.rows), (self.options.batch_size,)).tolist()
        return model(**self.collate([self.rows[i] for i in picked], model.device), use_cache=False).loss

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        sums = torch.zeros(len(self.bins), 2)
        for row in self.held_out:
            batch = self.collate([row], model.device)
            logits = model(**batch, use_cache=False).logits[0, len(row[0]) - 1 : -1]
            losses = F.cross_entropy(logits.float(), batch["labels"][0, len(row[0]) :], reduction="none").cpu()
            for i, (low, high) in enumerate(self.bins):
                sums[i] += torch.tensor([losses[low:high].sum(), len(losses[low:high])])
        names = [f"thoughts {low}-{high if high < 1 << 30 else ''}" for low, high in self.bins]
        return {name: (total / count).item() for name, (total, count) in zip(names, sums) if count}

    def example(self) -> tuple[torch.Tensor, str]:
        return torch.tensor([self.held_out[0][0]]), self.tokenizer.decode(self.held_out[0][0])

    def show(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids)


def make_task(options: argparse.Namespace) -> Recall | JsonLines:
    return JsonLines(options) if options.model else Recall(options)


# ---------------------------------------------------------------------------------------------------------------- arms


def adapt(base: torch.nn.Module, arm: str, options: argparse.Namespace) -> PeftModel:
    """Attach the arm's adapter; all arms have the same bounded cache and the same rank."""
    cache = dict(
        window_size=options.window_size,
        eviction_ratio=options.eviction_ratio,
        retained_prefix=JsonLines.retained_prefix if options.model else Recall.retained_prefix,
    )
    shared = dict(task_type="CAUSAL_LM", r=options.rank, pte_alpha=options.rank, num_global_tokens=options.rank // 2)
    if arm == "LoRA, same window":
        # LoRA on the projections, and around it a PTE adapter that is switched to nothing (A = 0, frozen): its cache.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        base = inject_adapter_in_model(
            LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets), base
        )
        model = get_peft_model(
            base, PTEConfig(task_type="CAUSAL_LM", r=1, num_global_tokens=1, state_update="none", **cache)
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model
    update = "none" if arm == "Global-only" else options.state_update
    return get_peft_model(base, PTEConfig(state_update=update, **shared, **cache))


def train(arm: str, options: argparse.Namespace, progress: Queue | None = None) -> dict[str, Any]:
    """Train one arm and evaluate it; in a process of its own, `progress` gets (arm, loss) after every step."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    task = make_task(options)
    output = Path(options.output)
    model = adapt(task.load_base(output / "base"), arm, options).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    bar = tqdm(range(options.steps), desc=f"{arm:<18}", mininterval=1, disable=progress is not None)
    start, history = time.time(), []
    for step in bar:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / 20) * decay
        loss = task.train_loss(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if progress is not None:
            progress.put((arm, loss.item()))
    bar.close()
    seconds = time.time() - start
    model.eval()
    if arm == "PTE":
        model.save_pretrained(output / "adapter")
    ids, _ = task.example()
    cache = PTECache()
    model.generate(input_ids=ids.to(model.device), max_new_tokens=8, do_sample=False, past_key_values=cache)
    return dict(
        arm=arm,
        scores=task.evaluate(model),
        cache_bytes=cache.nbytes,
        parameters=sum(p.numel() for p in parameters),
        seconds=seconds,
        loss=history,
    )


def train_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms, two at a time, under one bar."""
    context, losses = get_context("spawn"), {}
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(2, context) as pool,
        tqdm(total=len(ARMS) * options.steps, desc="three adapters", unit=" steps", mininterval=1) as bar,
    ):
        progress = manager.Queue()
        # The longest first: PTE on one core, the other two on the other.
        trained = {arm: pool.submit(train, arm, options, progress) for arm in reversed(ARMS)}
        while not (all(future.done() for future in trained.values()) and progress.empty()):
            try:
                arm, losses[arm] = progress.get(timeout=0.5)
            except Empty:
                continue
            bar.update()
            bar.set_postfix_str(", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()), refresh=False)
        return [trained[arm].result() for arm in ARMS]


def full_cache(options: argparse.Namespace) -> dict[str, Any]:
    """The base model with its full cache: the upper bound of what the window may cost."""
    task = make_task(options)
    model = task.load_base(Path(options.output) / "base").eval()
    ids, _ = task.example()
    out = model.generate(
        input_ids=ids.to(model.device), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    held = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    num_bytes = sum(t.numel() * t.element_size() for t in held)
    return dict(arm="base, full cache", scores=task.evaluate(model), cache_bytes=num_bytes, parameters=0)


# ------------------------------------------------------------------------------------------------------------- results


def print_table(rows: list[dict[str, Any]], metric: str) -> None:
    names = list(rows[0]["scores"])
    print(f"\n{metric}, by what lies between the thought and its use; bytes of the cache after one stream\n")
    print(f"{'':<20}" + "".join(f"{name:>18}" for name in names) + f"{'cache bytes':>14}{'trained':>12}")
    for row in rows:
        scores = "".join(f"{row['scores'][name]:>18.3f}" for name in names)
        print(f"{row['arm']:<20}{scores}{row['cache_bytes']:>14,}{row['parameters']:>12,}")


def plot(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for row, color in zip(rows, ("tab:gray", "tab:blue", "tab:orange", "tab:red")):
        axes[0].plot(list(row["scores"]), list(row["scores"].values()), marker="o", label=row["arm"], color=color)
        if row.get("loss"):
            smooth = torch.tensor(row["loss"]).unfold(0, min(20, len(row["loss"])), 1).mean(-1)
            axes[1].plot(smooth, label=row["arm"], color=color)
    axes[0].set(title="past the window", ylabel=metric)
    axes[1].set(title="training loss", xlabel="step")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def generate(options: argparse.Namespace) -> None:
    """What a new process does: load the base and the adapter, and go on from a stream."""
    task = make_task(options)
    base = task.load_base(Path(options.output) / "base")
    model = PeftModel.from_pretrained(base, Path(options.output) / "adapter").eval()
    ids, shown = task.example()
    cache = PTECache()
    out = model.generate(
        input_ids=ids.to(model.device),
        past_key_values=cache,
        max_new_tokens=1 if isinstance(task, Recall) else 64,
        do_sample=False,
    )
    print(f"\na new process, PeftModel.from_pretrained({str(Path(options.output) / 'adapter')!r}):")
    print(f"  stream      {shown}\n  generated   {task.show(out[0, ids.shape[1] :])}")
    print(f"  {cache.num_evicted[0]} thoughts were evicted, the cache holds {cache.nbytes:,} bytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint, id or path (default: train a small Llama)")
    parser.add_argument("--data", help='JSON lines with "prompt" and "completion", for --model')
    parser.add_argument("--output", default="outputs/quickstart", help="folder for results and adapter")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--window-size", type=int, default=16)
    parser.add_argument("--eviction-ratio", type=float, default=0.5)
    parser.add_argument("--state-update", choices=["delta", "sum"], default="delta")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a line, for --data")
    parser.add_argument("--pairs", type=int, default=4, help="pairs to remember, in the toy task")
    parser.add_argument("--filler", type=int, default=24, help="mean tokens between pairs and queries, in the toy task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", action="store_true", help="only load the saved adapter and generate")
    options = parser.parse_args()
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data go together")
    # A toy arm runs on one core, two arms at a time; a checkpoint takes what there is.
    options.threads = (os.cpu_count() or 1) if options.model else 1
    return options


def main() -> None:
    options = arguments()
    if options.generate:
        return generate(options)
    start, output = time.time(), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    task = make_task(options)
    task.make_base(output / "base")
    rows = [full_cache(options)]
    if options.model:
        rows += [train(arm, options) for arm in ARMS]
    else:
        rows += train_all(options)
    print_table(rows, task.metric)
    (output / "results.json").write_text(json.dumps(dict(options=vars(options), rows=rows), indent=1))
    plot(rows, task.metric, output / "plot.png")
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate"], check=True)
    print(f"\n{time.time() - start:.0f} seconds; results, plot and adapter in {output}")


if __name__ == "__main__":
    main()

"""What a bounded cache costs, and what an adapter brings back of it: tables by distance past the window, and a plot."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm

from controls import states_swapped, states_zeroed
from peft_pte import PTECache, sequence_divergence, sequence_logprobs
from peft_pte.replay.distillation import teacher_states
from peft_pte.trainers.distillation import Collator
from peft_pte.trainers.rows import left_padded, row_of

Row = dict[str, Any]


@contextlib.contextmanager
def other_adapter(model: PeftModel, name: str) -> Iterator[None]:
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter("default")


def question(row: Row, tokenizer: Any) -> list[int]:
    """The tokens that a row's answer follows."""
    if row.get("text"):
        return tokenizer(row["text"][: row["text"].rindex(str(row["answer"]))].rstrip())["input_ids"]
    return row_of(row, tokenizer, 0).prompt


def contains(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


class Evaluation:
    """Of the base with its full cache and under the window, and of PTE with its states, without, and with others' ones.

    The windowed base is an adapter that has not been trained: its `A` is zero, and its cache that of the policy.
    """

    FULL = "base, full cache"
    CONTROLS = ZEROED, SWAPPED = "PTE, states zeroed", "PTE, states swapped"

    def __init__(self, model: PeftModel, tokenizer: Any, options: argparse.Namespace):
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
        untrained = copy.deepcopy(model.peft_config["default"])
        untrained.init_weights = True
        model.add_adapter("untrained", untrained)
        model.set_adapter("default")

    def arms(self, num_rows: int) -> dict[str, AbstractContextManager[None]]:
        """What a batch of so many rows is run under. A row that is alone has no other one to swap states with."""
        arms = {
            self.FULL: self.model.disable_adapter(),
            "base, windowed": other_adapter(self.model, "untrained"),
            "PTE": contextlib.nullcontext(),
            self.ZEROED: states_zeroed(),
            self.SWAPPED: states_swapped(),
        }
        return {name: context for name, context in arms.items() if num_rows > 1 or name != self.SWAPPED}

    def batches(self, rows: Sequence[Any], name: str) -> Iterator[Sequence[Any]]:
        """Of equal sizes, as far as that goes, so that no row is alone without need.

        Twice as many rows as in training, since nothing is kept for a backward pass.
        """
        size = 2 * self.options.batch_size
        borders = torch.linspace(0, len(rows), -(-len(rows) // size) + 1).round().int().tolist()
        for start, end in tqdm(list(zip(borders, borders[1:])), desc=name):
            yield rows[start:end]

    def edges(self, longest: int) -> list[int]:
        """Borders of the bands: 0, w/2, w, 2w, 4w, ... tokens after the first eviction."""
        edges = [0, max(1, self.options.window_size // 2), max(2, self.options.window_size)]
        while edges[-1] <= longest:
            edges.append(2 * edges[-1])
        return edges

    @torch.no_grad()
    def by_distance(self, rows: list[Row], name: str) -> list[Row]:
        """KL to the base with its full cache, of encoded rows, and perplexity: a table row for each arm and band.

        Perplexity takes a forward of its own, so it is left out for arms whose states are taken away.
        """
        prefix, window = self.options.retained_prefix, self.options.window_size
        edges = self.edges(max((len(row["input_ids"]) for row in rows), default=0))
        sums = {arm: torch.zeros(len(edges), 3, dtype=torch.float64) for arm in self.arms(2)}
        for part in self.batches(sorted(rows, key=lambda row: len(row["input_ids"])), name):
            batch = {key: x.to(self.model.device) for key, x in Collator(0)(part).items()}
            ids, mask, lengths = batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"]
            teacher = teacher_states(self.model, ids, mask)
            # A token is predicted from the cache that the one before it has left; rows begin in column 0.
            kept = lengths if prefix == "prompt" else torch.full_like(lengths, prefix)
            distance = torch.arange(ids.shape[1], device=ids.device) - 1 - kept[:, None] - window
            band = torch.bucketize(distance, torch.tensor(edges, device=ids.device), right=True) - 1
            for arm, context in self.arms(len(part)).items():
                with context:
                    logprobs = torch.full(ids.shape, math.nan, device=ids.device)
                    if arm not in self.CONTROLS:
                        logprobs, _ = sequence_logprobs(self.model, ids, mask, lengths)
                    if arm != self.FULL:
                        found = sequence_divergence(self.model, ids, mask, lengths, teacher=teacher)
                        kl, counted = found.kl, found.counted
                    else:
                        kl, counted = torch.zeros_like(logprobs), (distance >= 0) & mask.bool()
                        counted &= torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
                for column, values in enumerate((torch.ones_like(kl), kl, -logprobs)):
                    sums[arm][:, column].index_add_(0, band[counted].cpu(), values[counted].double().cpu())
        return [
            dict(rows=name, arm=arm, distance=f"{low}-{high}", tokens=int(n), kl=kl / n)
            | ({} if arm in self.CONTROLS else dict(perplexity=math.exp(nll / n)))
            for arm, totals in sums.items()
            for low, high, (n, kl, nll) in zip(edges, edges[1:], totals.tolist())
            if n
        ]

    @torch.no_grad()
    def accuracy(self, rows: list[Row]) -> dict[str, float]:
        """Greedy completions that contain the answer, as a word of its own."""
        right, asked = dict.fromkeys(self.arms(2), 0), dict.fromkeys(self.arms(2), 0)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        for part in self.batches(rows, "answers"):
            prompts = [question(row, self.tokenizer) for row in part]
            given = left_padded(prompts, pad or 0, self.model.device)
            for arm, context in self.arms(len(part)).items():
                asked[arm] += len(part)
                with context:
                    done = self.model.generate(
                        **given, max_new_tokens=self.options.max_new_tokens, do_sample=False, pad_token_id=pad
                    )
                width = given["input_ids"].shape[1]
                texts = self.tokenizer.batch_decode(done[:, width:], skip_special_tokens=True)
                right[arm] += sum(contains(text, str(row["answer"])) for text, row in zip(texts, part))
        return {arm: right[arm] / count for arm, count in asked.items() if count}

    @torch.no_grad()
    def cache_bytes(self, row: Row) -> dict[str, int]:
        """What the cache holds when it has seen a whole row; the bounded one no more after longer rows."""
        ids, cache = torch.tensor([row["input_ids"]], device=self.model.device), PTECache()
        self.model(
            input_ids=ids, past_key_values=cache, prompt_lengths=torch.tensor([row["prompt_length"]]), logits_to_keep=1
        )
        with self.model.disable_adapter():
            full = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        held = [x for layer in full.layers for x in (layer.keys, layer.values)]
        return dict(tokens=ids.shape[1], full=sum(x.nbytes for x in held), bounded=cache.nbytes)


def print_tables(results: Row) -> None:
    table, accuracy, cache = results["table"], results["accuracy"], results["cache_bytes"]
    for name in dict.fromkeys(row["rows"] for row in table):
        part = [row for row in table if row["rows"] == name]
        distances = list(dict.fromkeys(row["distance"] for row in part))
        for metric, title in (("kl", "KL to the base with its full cache"), ("perplexity", "perplexity")):
            print(f"\n{name}: {title}, by tokens after the first eviction\n")
            print(f"{'':<22}" + "".join(f"{distance:>12}" for distance in distances))
            for arm in dict.fromkeys(row["arm"] for row in part if metric in row):
                values = {row["distance"]: row[metric] for row in part if row["arm"] == arm}
                print(f"{arm:<22}" + "".join(f"{values.get(distance, math.nan):>12.3f}" for distance in distances))
    if not table:
        print("\nNo held-out row is longer than the window, so there is nothing to compare.")
    for name, values in accuracy.items():
        print(f"\n{name}: completions that contain the answer")
        print("\n".join(f"{arm:<22}{value:>12.3f}" for arm, value in values.items()))
    print(f"\ncache after {cache['tokens']} tokens: {cache['full']:,} bytes full, {cache['bounded']:,} bounded")


def plot(results: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = results["table"]
    names = list(dict.fromkeys(row["rows"] for row in table))
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(5 * len(names) + 5, 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for arm, color in zip(dict.fromkeys(row["arm"] for row in table), ("gray", "blue", "red", "orange", "olive")):
            part = [row for row in table if (row["rows"], row["arm"]) == (name, arm)]
            distances, values = [row["distance"] for row in part], [row["kl"] for row in part]
            axis.plot(distances, values, marker="o", label=arm, color=f"tab:{color}")
        axis.set(title=f"held-out {name}", xlabel="tokens after the first eviction", ylabel="KL to the full cache")
    logs = [entry for entry in results["history"] if "kl" in entry]
    for name, label, color in (("kl", "PTE", "red"), ("kl_windowed_base", "base, windowed", "blue")):
        known = [(entry["step"], entry[name]) for entry in logs if name in entry]
        axes[0, -1].plot(*zip(*known) if known else ([], []), label=label, color=f"tab:{color}")
    axes[0, -1].set(title="training", xlabel="step", ylabel="KL to the full cache")
    for axis in axes[0]:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

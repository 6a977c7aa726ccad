"""What the memory of one layer can learn from a frozen checkpoint, in seconds: choices of a design before a training.

    python benchmarks/evidence/probe.py --checkpoint <folder> --layers 18 \
        --arms PTE "PTE, gate of writes" "PTE, gate of writes, starts as attention"

Keys, values and the inputs of attention are those of the base under the window, for streams of the task "notes". They
are computed once. Then the encoder and the output projection's update of one layer, of each arm, learn alone: notes and
text are written, the questions' inputs ask, and what is answered is read by the base's own rows for the ten digits. In
the table: the share of held-out questions whose first digit is right, and nats a digit, by tokens of text that are
written after the notes. A guess among the three numbers that were written is right in 0.4 (0.55 nats).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from arms import ARMS
from notes import NOTE, Notes
from peft_pte.encoder import Reading, read_layers
from peft_pte_kernels import reference
from training import Settings, adapted, share_of_rate

TASK, NAME = "notes_any_word", "default"
TEXT = 96  # tokens of text between notes and questions, of which an evaluation writes some
READ_OUT = 4.0  # how much longer than one the rows of the read-out are


class Features(NamedTuple):
    """Of one layer, for N streams, in half precision: keys before RoPE and values of what is written, and what asks."""

    keys: torch.Tensor  # [N, notes and text, d_kv]
    values: torch.Tensor
    asked: torch.Tensor  # [N, digits, hidden size]
    digits: torch.Tensor  # [N, digits]: what is to be answered, 0 to 9


def collect(model: nn.Module, task: Notes, layers: list[int], count: int, seed: int) -> dict[int, Features]:
    """Features of `count` streams, under the window of `model`, whose updates are zero still."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles, decoder = [], model.get_base_model().model

    def keep(layer: int, what: str, x: torch.Tensor) -> None:
        found.setdefault((layer, what), []).append(x.half())

    for layer in layers:
        attention = decoder.layers[layer].self_attn
        handles.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs, i=layer: keep(i, "asked", kwargs["hidden_states"]), with_kwargs=True
            )
        )
        for name in ("k_proj", "v_proj"):
            handles.append(
                getattr(attention, name).register_forward_hook(
                    lambda module, args, result, i=layer, n=name: keep(i, n, result)
                )
            )
    stream = task.sample(count, TEXT, torch.Generator().manual_seed(seed))
    columns = stream.answers[0].nonzero()[:, 0]
    first = task.prompt_length
    end = first + task.completed({})["facts"] * NOTE.length + TEXT
    with torch.no_grad():
        model(
            input_ids=stream.input_ids.to(model.device),
            prompt_lengths=first,
            use_cache=False,
            logits_to_keep=columns[:1].to(model.device),
        )
    for handle in handles:
        handle.remove()
    of_digit = torch.full((int(task.words.digits.max()) + 1,), -1).scatter(0, task.words.digits, torch.arange(10))
    whole = {key: torch.cat(segments, 1) for key, segments in found.items()}  # a replay runs segment by segment
    return {
        i: Features(
            *(whole[i, name][:, first:end].clone() for name in ("k_proj", "v_proj")),
            whole[i, "asked"][:, columns - 1].clone(),
            of_digit[stream.input_ids[:, columns]],
        )
        for i in layers
    }


class Memory(nn.Module):
    """The encoder and the output projection's update of one layer, by the package's own modules."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.encoder, self.output = attention.thought_encoder, attention.o_proj
        if self.encoder.pte_rule[NAME].update != "delta" or self.output.pte_reads_input[NAME]:
            raise SystemExit("a probe asks with the inputs of attention, and knows the delta rule only")

    def forward(self, features: Features, rows: torch.Tensor, text: int) -> torch.Tensor:
        """[rows, digits, hidden size]: what the layer's output gets, when notes and `text` tokens have been written."""
        rule, length = self.encoder.pte_rule[NAME], features.keys.shape[1] - TEXT + text
        keys, values = (x[rows, :length].float() for x in features[:2])
        taps = self.encoder.pte_key_conv[NAME]() if rule.num_taps else None
        core = keys.new_zeros(len(keys), rule.num_carried, rule.r)
        keys, values = self.encoder.pte_key[NAME](keys), self.encoder.pte_value[NAME](values)
        core = reference.write("delta", core, keys, values, None, taps)
        query, initial = self.encoder.reading(NAME)
        state = read_layers(rule, core[None], Reading(query[None], initial[None]))[0]
        asked = features.asked[rows].float()
        gate = self.output.pte_gate[NAME].weight if NAME in self.output.pte_gate else None
        weights = [self.output.pte_A[NAME].weight], [self.output.pte_B[NAME].weight]
        nothing = torch.zeros_like(asked)
        return reference.low_rank_update(asked, [nothing], state, *weights, self.output.pte_scaling[NAME], gate)[0]


def train(memory: Memory, rows: torch.Tensor, training: Features, held_out: Features, steps: int, batch_size: int,
          learning_rate: float, seed: int) -> dict[int, tuple[float, float]]:  # fmt: skip
    """By tokens of text: the share of first digits that are right, and nats a digit. `rows`: [10, hidden size]."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in memory.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    def logits(features: Features, chosen: torch.Tensor, text: int) -> torch.Tensor:
        return READ_OUT * memory(features, chosen, text) @ rows.mT

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share_of_rate(step, steps)
        chosen = torch.randint(len(training.digits), (batch_size,), generator=generator)
        text = int(torch.randint(TEXT * 2 // 3 + 1, (), generator=generator))
        loss = F.cross_entropy(logits(training, chosen, text).flatten(0, 1), training.digits[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    found, everything = {}, torch.arange(len(held_out.digits))
    for text in (0, TEXT * 2 // 3, TEXT):
        with torch.no_grad():
            answered = logits(held_out, everything, text)
        right = (answered.argmax(-1) == held_out.digits)[:, ::2].float().mean().item()  # tens and ones take turns
        found[text] = right, F.cross_entropy(answered.flatten(0, 1), held_out.digits.flatten()).item()
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that the evidence has converted")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["PTE"], metavar="ARM")
    parser.add_argument("--streams", type=int, default=2048, help="to learn from; a quarter as many are held out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="streams")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    settings = Settings.of(TASK, options.checkpoint)
    model = adapted(ARMS["PTE"], settings, options.seed).eval()
    tasks = settings.streams, settings.streams.held_out
    chunks: list[list[dict[int, Features]]] = [[], []]
    for number, (task, count) in enumerate(zip(tasks, (options.streams, options.streams // 4))):
        for start in range(0, count, 64):
            size = min(64, count - start)
            chunks[number].append(collect(model, task, options.layers, size, 1_000_000 * number + start))
            print(f"features of {start + size} of {count} streams", end="\r", flush=True)
    rows = model.get_output_embeddings().weight[settings.streams.words.digits].float().detach()
    rows = F.normalize(rows - rows.mean(0), dim=-1)
    features = {
        layer: [Features(*map(torch.cat, zip(*(chunk[layer] for chunk in part)))) for part in chunks]
        for layer in options.layers
    }
    results = []
    for arm in options.arms:
        with ARMS[arm].variant():
            decoder = adapted(ARMS[arm], settings, options.seed).get_base_model().model
        for layer, (training, held_out) in features.items():
            attention = decoder.layers[layer].self_attn
            found = train(Memory(attention), rows, training, held_out, options.steps, options.batch_size,
                          options.learning_rate, options.seed)  # fmt: skip
            told = "  ".join(f"{text}: {right:.2f} ({nats:.2f})" for text, (right, nats) in found.items())
            print(f"layer {layer:>2}  {arm:<44} {told}", flush=True)
            results.append(dict(layer=layer, arm=arm, found=found))
    return results


if __name__ == "__main__":
    main()

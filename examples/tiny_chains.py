"""The tiny job of grpo_math.py: chains of additions modulo ten, a small base that does them, and a start for GRPO."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peft_pte import distillation_loss
from peft_pte.replay.distillation import adapter_off

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Chains:
    """prompt: a +3 b +7 c +1 ... ? c | thoughts: a +3 3 b +7 0 c +1 1 ... so c 1

    A step takes an operand from the prompt, which stays, and the result before it. The answer is the result of a chosen
    step: a sum of three operands or more, which the model has thought, but which has left the window unless it is late.
    """

    NAMES = "abcdefgh"
    ASKED = range(2, 8)
    WORDS = ("<pad>", "<eos>", "<user>", "<assistant>", "?", "so", *NAMES)
    VOCAB = {word: i for i, word in enumerate((*WORDS, *map(str, range(10)), *(f"+{i}" for i in range(10))))}

    @classmethod
    def tokenizer(cls) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel(cls.VOCAB, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        return tokenizer

    @classmethod
    def problem(cls, rng: random.Random, questions: int = 1) -> Row:
        operands = [rng.randrange(10) for _ in cls.NAMES]
        results = [sum(operands[: i + 1]) % 10 for i in range(len(operands))]
        steps = [f"{name} +{operand}" for name, operand in zip(cls.NAMES, operands)]
        asked = rng.sample(cls.ASKED, questions)
        thoughts = [f"{step} {result}" for step, result in zip(steps, results)]
        return dict(
            prompt=" ".join([*steps, "?", *(cls.NAMES[i] for i in asked)]),
            thoughts=" ".join([*thoughts, "so", *(f"{cls.NAMES[i]} {results[i]}" for i in asked)]),
            answer=str(results[asked[-1]]),
        )

    @classmethod
    def problems(cls, size: int, seed: int) -> Dataset:
        rng = random.Random(seed)
        rows = [cls.problem(rng) for _ in range(size)]
        return Dataset.from_list([dict(row, prompt=[dict(role="user", content=row["prompt"])]) for row in rows])

    @classmethod
    def batches(cls, size: int, seed: int, questions: tuple[int, ...] = (1,)) -> Iterator[Batch]:
        """Endless supervised batches; all rows of one have the same layout."""
        rng = random.Random(seed)
        while True:
            asked = rng.choice(questions)
            rows = [cls.problem(rng, asked) for _ in range(size)]
            lines = [f"<user> {r['prompt']} <assistant> {r['thoughts']} <eos>".split() for r in rows]
            ids = torch.tensor([[cls.VOCAB[word] for word in line] for line in lines])
            labels = ids.clone()
            labels[:, : lines[0].index("<assistant>") + 1] = -100
            yield dict(input_ids=ids, labels=labels)

    @staticmethod
    def reward(completions: list[list[Row]], answer: list[str], **kwargs: Any) -> list[float]:
        """1 if what is said after "so" ends with the answer."""
        words = [completion[0]["content"].split() for completion in completions]
        return [float("so" in line and line[-1] == right) for line, right in zip(words, answer)]

    @classmethod
    def make_base(cls, folder: Path, steps: int, seed: int) -> None:
        """A small Llama, trained with its full cache. More questions a problem make it learn to look back sooner."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(cls.VOCAB),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.05,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
        batches = cls.batches(32, seed, questions=(1, 4, 4))
        fit(model, batches, lambda batch: model(**batch, use_cache=False).loss, steps, learning_rate=3e-3, until=0.01)
        staging = folder.with_name(f"_{folder.name}")  # a base that is there is complete
        model.save_pretrained(staging)
        cls.tokenizer().save_pretrained(staging)
        os.replace(staging, folder)

    @classmethod
    @torch.no_grad()
    def accuracy(cls, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
        """Greedy, on held-out problems."""
        problems = cls.problems(512, seed=12345)
        template = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True)
        inputs = tokenizer.apply_chat_template(list(problems["prompt"]), **template)
        model.eval()
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        model.train()
        done = [[dict(content=text)] for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
        return sum(cls.reward(done, problems["answer"])) / len(done)


def fit(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    steps: int,
    learning_rate: float,
    until: float = 0.0,
) -> None:
    """Train what is trainable for `steps` at most, or until the loss is below `until` and 100 steps more."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.95))
    average, tail, step = 3.0, 100, 0
    model.train()
    while tail and step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * tail / 100
        loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average += 0.05 * (loss.item() - average)
        tail -= average < until  # from then on the rate goes to zero
        step += 1


def supervised_start(model: PeftModel, steps: int, seed: int) -> None:
    """Next-token training on right thoughts, under the window."""
    fit(model, Chains.batches(64, seed), lambda batch: model(**batch, use_cache=False).loss, steps, 5e-3)


def distilled_start(model: PeftModel, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """The base with its full cache teaches the arm its own thoughts: neither answers nor rewards are used."""
    fit(model, own_thoughts(model, tokenizer, seed), lambda batch: distillation_loss(model, **batch), steps, 5e-3)


@torch.no_grad()
def own_thoughts(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, seed: int, size: int = 64, count: int = 4096
) -> Iterator[Batch]:
    """Endless batches of what the base samples under its full cache; `count` thoughts are drawn, and shuffled anew."""
    problems = list(Chains.problems(count, seed)["prompt"])
    template = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True)
    inputs = tokenizer.apply_chat_template(problems, **template)
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(seed)
    with adapter_off(model):
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=True, top_k=0)
    ended = (ids == tokenizer.eos_token_id) & (torch.arange(ids.shape[1]) >= width)
    mask = (ended.int().cumsum(1) - ended.int() == 0).long()  # the end itself is a thought
    mask[:, :width] = inputs["attention_mask"]
    while True:
        for rows in torch.randperm(count).split(size):
            yield dict(input_ids=ids[rows], attention_mask=mask[rows], prompt_lengths=width)

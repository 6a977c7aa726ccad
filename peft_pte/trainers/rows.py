"""Rows of text as tokens, and completions of the base model for rows that are prompts only, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..replay.distillation import adapter_off

KINDS = "`text`, `prompt` and `completion`, `messages`, or `prompt` alone"


class Row(NamedTuple):
    """A row as tokens. `completion` None: it is still to be made."""

    prompt: list[int]
    completion: list[int] | None


def chat_tokens(messages: Sequence[Mapping[str, str]], tokenizer: Any, generates: bool) -> list[int]:
    """A conversation through the tokenizer's chat template; `generates`: an answer of the assistant is to follow."""
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=generates, return_dict=False))


def chat_row(prompt: Sequence[Mapping[str, str]], answer: Sequence[Mapping[str, str]], tokenizer: Any) -> Row:
    """A conversation and the answer to it; without any answer, that is to be made.

    Raises:
        ValueError: the template writes the conversation otherwise when the answer follows.
    """
    before = chat_tokens(prompt, tokenizer, generates=True)
    if not answer:
        return Row(before, None)
    whole = chat_tokens([*prompt, *answer], tokenizer, generates=False)
    if whole[: len(before)] != before:
        raise ValueError(
            "The chat template writes a conversation otherwise when its answer follows, so it is not known where the "
            "answer begins. Apply it yourself and give `prompt` and `completion` as strings."
        )
    return Row(before, whole[len(before) :])


def row_of(row: Mapping[str, Any], tokenizer: Any, text_prompt_tokens: int) -> Row:
    """The tokens of one row, of whichever kind; see `PTEDistillationTrainer`.

    Raises:
        ValueError: the row is of no kind, or its chat template does not say where the answer begins.
    """
    text, messages, prompt, completion = (row.get(name) for name in ("text", "messages", "prompt", "completion"))
    if messages:
        has_answer = messages[-1]["role"] == "assistant"
        return chat_row(messages[:-1], messages[-1:], tokenizer) if has_answer else chat_row(messages, [], tokenizer)
    if text is not None:
        tokens = tokenizer(text)["input_ids"]
        return Row(tokens[:text_prompt_tokens], tokens[text_prompt_tokens:])
    if isinstance(prompt, str):
        if completion is None:
            return Row(tokenizer(prompt)["input_ids"], None)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return Row(tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"] + end)
    if prompt:
        if isinstance(completion, str):
            completion = [dict(role="assistant", content=completion)]
        return chat_row(prompt, completion or [], tokenizer)
    raise ValueError(f"A row has the columns {sorted(row)}, but must have {KINDS}.")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; what a killed process has begun is left out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append whole lines, in one write that is on the disk afterwards. A half line at the end is removed before."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(text.encode())
        os.fsync(file.fileno())


class Completions:
    """The base model's own completions under its full cache, a JSON line each, by what they were made from.

    Args:
        path: of the file. Of several processes each writes a file of its own beside it, and reads all.
        options: what the result depends on besides the prompt: of `generate`, and the seed.
        rank, world: of this process and how many there are; they share the filesystem.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], rank: int = 0, world: int = 1):
        self.path, self.options, self.rank, self.world = path, dict(options), rank, world

    def key(self, base: str, prompt: list[int]) -> str:
        return hashlib.sha256(json.dumps([base, prompt, self.options], sort_keys=True).encode()).hexdigest()[:32]

    def read(self) -> dict[str, list[int]]:
        """What there is, by key, of all processes of this or of earlier runs."""
        files = [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))]
        return {line["key"]: line["completion"] for path in files for line in read_lines(path)}

    def make(
        self, model: nn.Module, tokenizer: Any, prompts: list[list[int]], batch_size: int, silent: bool = False
    ) -> None:
        """Make what is missing of this process's share. After a kill -9 a second call goes on where it ended, with the
        same results: batches are the same, and each has a seed of its own."""
        base = str(getattr(model.config, "_name_or_path", ""))
        known = self.read()
        own = self.path if self.world == 1 else self.path.with_suffix(f".{self.rank}{self.path.suffix}")
        batches = [(start, prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
        for start, batch in tqdm(batches[self.rank :: self.world], desc="completions", disable=silent):
            keys = [self.key(base, prompt) for prompt in batch]
            if all(key in known for key in keys):
                continue
            made = complete(model, tokenizer, batch, self.options, start)
            texts = tokenizer.batch_decode(made)
            lines = [dict(key=key, text=text, completion=ids) for key, text, ids in zip(keys, texts, made)]
            append_lines(own, [line for line in lines if line["key"] not in known])
            known.update((line["key"], line["completion"]) for line in lines)

    def of(self, model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """Those of all prompts, when every process has made its share."""
        base, known = str(getattr(model.config, "_name_or_path", "")), self.read()
        return [known[self.key(base, prompt)] for prompt in prompts]


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as `generate` takes them: `input_ids` and `attention_mask` [B, T], padding in front."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {name: torch.tensor(x, device=device) for name, x in dict(input_ids=ids, attention_mask=mask).items()}


def complete(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], options: Mapping[str, Any], number: int
) -> list[list[int]]:
    """Completions of one batch by the base model, each up to and with its end-of-sequence token.

    `options`: of `generate`, and `seed`, which is that of the run; `number` makes it that of the batch.
    """
    device = next(model.parameters()).device
    end = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    inputs = left_padded(prompts, pad, device)
    given = {name: value for name, value in options.items() if name != "seed"}
    was_training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), adapter_off(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(options["seed"] + number)
            made = model.generate(**inputs, pad_token_id=pad, use_cache=True, **given)
    finally:
        model.train(was_training)
    rows = made[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths)]

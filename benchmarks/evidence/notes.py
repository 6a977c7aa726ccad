"""Notes in plain English, under real text, for a real pretrained base.

    Notes: | The number of shells of Tom is 47. ... | text on Python | Questions: The number of shells of Tom is 47. ...

A question is the beginning of its note. The checkpoint, which is small, answers so untrained where it sees the notes;
questions in words ("How many shells does Tom have?") it mostly does not.
Names and things are words of one token, numbers have two digits of one token each, so that all rows have one layout.
Training and evaluation share the digits only: names, things and filler text of the evaluation occur in no training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shared import dtype_here, paragraphs
from streams import Parts, Task, shuffled

UNSUITABLE = "notes and ledgers need a tokenizer that splits them as SmolLM2's does"
Encode = Callable[[str], list[int]]

NAMES = (
    "Tom Anna Ben Clara David Emma Frank Grace Henry Jack Kate Leo Maria Nick Paul Rosa Sam Victor Walter Alice Bob "
    "Carl Diana Eric George Hannah Ivan James Karen Linda Mark Nina Oscar Peter Robert Sarah Thomas Vera William Laura "
    "Simon Julia Martin Lucy Adam Jane Mary John Michael Susan Helen Ruth Daniel Emily Oliver Rachel Steven Kevin "
    "Brian Jason Lisa Amy Philip Alan Roger Max Lily Noah Ella Jacob Joseph Edward Charles Albert Arthur Richard Lewis "
    "Margaret Elizabeth Catherine Andrew Anthony Matthew Luke Gary Larry Jerry Billy Tony Harry"
)
THINGS = (
    "shells stamps coins books apples pencils stones marbles cards buttons keys bottles boxes cups plates flowers "
    "trees chairs shoes hats maps boats bikes cars dogs cats horses birds goats cows ducks chickens rings pearls pens "
    "toys balls lamps clocks watches pictures posters tickets candles spoons forks knives bowls baskets bags coats "
    "shirts socks gloves ropes nails bricks tiles beads leaves seeds potatoes tomatoes carrots onions oranges lemons "
    "bananas grapes berries nuts eggs cakes cookies pots jars tents drums guitars rabbits turtles frogs spiders bees "
    "snakes mice notebooks letters envelopes magazines"
)


VERBS = (" gets", " loses")


def words_in(text: str, held_out: bool) -> list[str]:
    """Of each five words the last one is for the evaluation."""
    return [word for i, word in enumerate(text.split()) if (i % 5 == 4) == held_out]


def filler_text(held_out: bool) -> str:
    """Prose of the Python documentation that every Python carries; the last quarter is for the evaluation."""
    return "\n".join(paragraphs(held_out))


def check_length(text: str, tokens: Sequence[int | str], length: int) -> None:
    if len(tokens) != length:
        raise ValueError(f"{UNSUITABLE}: {text!r} has {len(tokens)} tokens, not {length}.")


def only_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Of each word its one token."""
    encoded = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    for word, tokens in zip(words, encoded):
        check_length(word, tokens, 1)
    return torch.tensor(encoded)[:, 0]


class Said(NamedTuple):
    """A text, and how many tokens it takes, known before there is a tokenizer, which is checked against this."""

    text: str
    length: int


@dataclass(frozen=True)
class Wording:
    """What stands around the words of a task. `sentences` have gaps: one word with its space, or two digits."""

    prompt: Said
    before_questions: Said
    sentences: tuple[Said, ...]


NOTE = Said("The number of{thing} of{name} is {number}.\n", 12)
NOTES = Wording(Said("Notes:\n", 3), Said("\nQuestions:\n", 4), (NOTE,))


class Template:
    """A sentence as tokens with gaps: all of one token, but `number`, which is `tens` and `ones`."""

    def __init__(self, text: str, length: int, encode: Encode):
        self.tokens: list[int | str] = []
        for i, piece in enumerate(re.split(r"\{(\w+)\}", text)):
            is_gap = i % 2 == 1
            self.tokens += (["tens", "ones"] if piece == "number" else [piece]) if is_gap else encode(piece)
        check_length(text, self.tokens, length)

    def filled(self, **gaps: torch.Tensor) -> torch.Tensor:
        """[..., length] tokens, from what stands in each gap, [...]."""
        one = gaps["name"]
        return torch.stack([gaps[t] if isinstance(t, str) else torch.full_like(one, t) for t in self.tokens], -1)

    @property
    def is_number(self) -> torch.Tensor:
        """[length] bool: both digits of `number`."""
        return torch.tensor([token in ("tens", "ones") for token in self.tokens])


def other_words(tokenizer: PreTrainedTokenizerBase, pattern: str, listed: str) -> list[str]:
    """All words of one token, behind a space, that match `pattern` and are not listed; in the vocabulary's order."""
    first, *_ = tokenizer(" a", add_special_tokens=False)["input_ids"]
    mark, known = tokenizer.convert_ids_to_tokens(first).removesuffix("a"), set(listed.split())
    found = [token.removeprefix(mark) for token in sorted(tokenizer.get_vocab()) if token.startswith(mark)]
    words = [word for word in found if re.fullmatch(pattern, word) and word not in known]
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    return [word for word, tokens in zip(words, encoded) if len(tokens) == 1]


class Words:
    """The tokens that streams are made of, by a base's tokenizer; its way to split words is checked.

    `any_word`: names and things of training are all capitalised and all small words of the vocabulary, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wording: Wording, held_out: bool, any_word: bool = False):
        def encode(text: str) -> list[int]:
            # A long text at once is meant here, though it is no input of the model.
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        def fixed(said: Said) -> torch.Tensor:
            tokens = encode(said.text)
            check_length(said.text, tokens, said.length)
            return torch.tensor(tokens)

        self.prompt, self.before_questions = fixed(wording.prompt), fixed(wording.before_questions)
        self.sentences = [Template(said.text, said.length, encode) for said in wording.sentences]
        pools = [words_in(words, held_out) for words in (NAMES, THINGS)]
        self.listed_names, self.listed_things = map(len, pools)  # which come first
        if any_word and not held_out:
            pools[0] += other_words(tokenizer, "[A-Z][a-z]{2,}", NAMES)
            pools[1] += other_words(tokenizer, "[a-z]{3,}", THINGS)
        names, things = ([f" {word}" for word in words] for words in pools)
        self.names, self.things, self.verbs, self.digits = (
            only_tokens(words, tokenizer) for words in (names, things, VERBS, "0123456789")
        )
        self.text = torch.tensor(encode(filler_text(held_out)))
        # Whether what is put together is what the tokenizer makes of whole sentences.
        count = max(len(names), len(things), 90)
        number, change = 10 + torch.arange(count) % 90, 1 + torch.arange(count) % 9
        tokens = dict(
            name=self.names.repeat(count)[:count],
            thing=self.things.repeat(count)[:count],
            verb=self.verbs.repeat(count)[:count],
            change=self.digits[change],
            **self.number(number),
        )
        said = [
            dict(
                name=names[i % len(names)],
                thing=things[i % len(things)],
                verb=VERBS[i % len(VERBS)],
                change=int(change[i]),
                number=int(number[i]),
            )
            for i in range(count)
        ]
        for (text, _), template in zip(wording.sentences, self.sentences):
            sentences = [text.format(**gaps) for gaps in said]
            encoded = tokenizer(sentences, add_special_tokens=False)["input_ids"]
            for sentence, row, expected in zip(sentences, template.filled(**tokens).tolist(), encoded):
                if expected != row:
                    raise ValueError(f"{UNSUITABLE}: {sentence!r} is not the tokens of its words.")

    def number(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its two digits, as tokens for the gap of the same name."""
        return dict(tens=self.digits[number // 10], ones=self.digits[number % 10])


@lru_cache
def words_of(folder: Path, wording: Wording, held_out: bool, any_word: bool = False) -> Words:
    return Words(AutoTokenizer.from_pretrained(folder), wording, held_out, any_word)


class Notes(Task):
    """Evidence: `facts` notes, each of another name, thing and two-digit number. All are asked for, in random order.

    Answers are the digits, and those of the first question are scored. A number is right if both digits are.
    """

    name = "notes"
    wording = NOTES
    prompt_length = NOTES.prompt.length
    difficulty = dict(facts=3)
    whole_answers = True
    matched_rank = 40
    settings = dict(
        window_size=32,
        rank=32,
        scaling=0.5,
        steps=100,
        batch_size=8,
        learning_rate=3e-3,
        distances=(0, 32, 64, 128, 256),
        beyond=(),  # which would take longer than the training
        num_evaluated=64,
        base_steps=0,
        # Of the frozen base; adapters are float32. Bfloat16 is that of the checkpoint's folder, and slow on some CPUs.
        base_dtype="float32" if dtype_here("auto") == "float32" else "bfloat16",
    )
    grpo = dict(max_steps=40, learning_rate=5e-4, per_device_train_batch_size=32)

    any_word = False  # see Words

    def __init__(self, folder: Path | None = None, held_out: bool = False):
        self.folder, self.of_evaluation = folder, held_out

    def opened(self, folder: Path) -> Notes:
        return type(self)(folder)

    @property
    def held_out(self) -> Notes:
        """Other names, things and text."""
        return type(self)(self.folder, held_out=True)

    @property
    def words(self) -> Words:
        if self.folder is None:
            raise ValueError(f"{self.name} is written with the tokenizer of a base: call opened(folder) first.")
        return words_of(self.folder, self.wording, self.of_evaluation, self.any_word)

    def length(self, distance: int, **difficulty: int) -> int:
        facts = self.completed(difficulty)["facts"]
        return self.prompt_length + facts * 2 * NOTE.length + distance + self.wording.before_questions.length

    @property
    def most_names(self) -> int:
        """The evaluation has so many names, and as many things."""
        return min(len(words_in(words, held_out=True)) for words in (NAMES, THINGS))

    def kv_width(self, hidden_size: int) -> int:
        return 3 * 64  # heads of SmolLM2-135M

    def fault(self, given: dict[str, int]) -> str:
        most = self.most_names
        return "" if 1 <= given["facts"] <= most else f"facts must be 1 to {most}"

    def possible_answers(self, given: dict[str, int]) -> int:
        return 90

    def chosen(
        self, words: torch.Tensor, listed: int, size: int, generator: torch.Generator, count: int
    ) -> torch.Tensor:
        """[size, count]: in each row different ones. The first `listed` words are not of any kind."""
        return words[shuffled(size, len(words), generator, count)]

    def prompt(self, size: int) -> torch.Tensor:
        return self.words.prompt.repeat(size, 1)

    def noise(self, size: int, distance: int, generator: torch.Generator) -> torch.Tensor:
        """Anywhere in the text."""
        text = self.words.text
        start = torch.randint(len(text) - distance + 1, (size, 1), generator=generator)
        return text[start + torch.arange(distance)]

    def write(self, size: int, generator: torch.Generator, given: dict[str, int]) -> Parts:
        words, facts = self.words, given["facts"]
        (note,) = words.sentences
        gaps = dict(
            name=self.chosen(words.names, words.listed_names, size, generator, facts),
            thing=self.chosen(words.things, words.listed_things, size, generator, facts),
            tens=words.digits[torch.randint(1, 10, (size, facts), generator=generator)],
            ones=words.digits[torch.randint(10, (size, facts), generator=generator)],
        )
        order = shuffled(size, facts, generator)
        asked = note.filled(**{gap: tokens.gather(1, order) for gap, tokens in gaps.items()})
        evidence = note.filled(**gaps).flatten(1)
        return self.parts(evidence, torch.zeros(facts * NOTE.length, dtype=torch.bool), asked, note)

    def parts(
        self, evidence: torch.Tensor, evidence_answers: torch.Tensor, asked: torch.Tensor, sentence: Template
    ) -> Parts:
        """Questions are sentences, [N, questions, length]: their numbers are answers, and the first one is scored."""
        size, questions, length = asked.shape
        before = self.wording.before_questions.length
        answers = torch.cat([torch.zeros(before, dtype=torch.bool), sentence.is_number.repeat(questions)])
        return Parts(
            evidence,
            torch.cat([self.words.before_questions.repeat(size, 1), asked.flatten(1)], 1),
            evidence_answers,
            answers,
            answers & (torch.arange(len(answers)) < before + length),
        )


class NotesOfAnyWord(Notes):
    """The same evaluation after training on all words of the vocabulary but its own: nothing is learned by heart.

    With the few names and things of the plain task, training is ahead of held-out ones when facts are learned.
    """

    name = "notes_any_word"
    any_word = True


class NotesOfMixedWords(NotesOfAnyWord):
    """The same evaluation again; half of the rows in training have names of people only, and half only such things.

    Any two words of the vocabulary are told apart more easily than two names, which is what the evaluation asks for.
    """

    name = "notes_mixed"

    def chosen(
        self, words: torch.Tensor, listed: int, size: int, generator: torch.Generator, count: int
    ) -> torch.Tensor:
        of_any_kind = super().chosen(words, listed, size, generator, count)
        if self.of_evaluation:
            return of_any_kind
        alike = super().chosen(words[:listed], listed, size, generator, count)
        return torch.where(torch.rand(size, 1, generator=generator) < 0.5, alike, of_any_kind)

"""Notes and ledgers for a real checkpoint, a tiny random one here: they can be solved by reading; everything runs."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import notes
import rl
from arms import ARMS
from ledger import Ledger
from notes import Notes
from peft_pte import attention_loss
from tasks import TASKS
from training import Settings, adapted, run_arm, supervised

OTHERS = "Berlin Monday Wave river cloud spark"
SMALL = "number of is has gets loses and"
BEGINNINGS = ["The", "Notes", "Questions", "Now", "Then", "Led", "ger", "Later"]


def save_tokenizer(folder: Path, left_out: str = "") -> int:
    """As SmolLM2's: bytes and merges, single digits. Only words of notes are merged, so that it is made quickly."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    words = [f" {word}" for word in f"{notes.NAMES} {notes.THINGS} {OTHERS} {SMALL}".split() if word != left_out]
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=1,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*words, *BEGINNINGS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", eos_token="<end>").save_pretrained(folder)
    return backend.get_vocab_size()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", torch.float32, vocab_size=save_tokenizer(path)).save_pretrained(path)
    return path


def text_of(folder: Path, ids: torch.Tensor) -> str:
    return PreTrainedTokenizerFast.from_pretrained(folder).decode(ids)


def number_asked_for(read: str) -> str:
    """From the text up to a question's number: what the note with that beginning says."""
    said, question = read.rsplit("\n", 1)
    assert said.startswith("Notes:\n")
    (number,) = re.findall(re.escape(question) + r"(\d\d)\.\n", said)
    return number


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("facts, distance", [(1, 0), (3, 40), (8, 7)])
def test_numbers_can_be_read_off_the_text(folder: Path, held_out: bool, facts: int, distance: int) -> None:
    task = Notes(folder, held_out)
    stream = task.sample(4, distance, torch.Generator().manual_seed(0), facts=facts)
    assert stream.input_ids.shape[1] == task.length(distance, facts=facts)
    columns = stream.answers[0].nonzero()[:, 0].tolist()
    assert (stream.answers == stream.answers[0]).all() and len(columns) == 2 * facts
    assert stream.scored[0].nonzero()[:, 0].tolist() == columns[:2]
    for row in stream.input_ids:
        for tens in columns[::2]:
            assert text_of(folder, row[tens : tens + 2]) == number_asked_for(text_of(folder, row[:tens]))


def balances(read: str) -> list[str]:
    """From a ledger up to a number: what each change before it, and the one that has begun, should have said."""
    has: dict[str, int] = {}
    said = []
    line = r"Now (\w+) has (\d\d) coins\.|Then (\w+) (gets|loses) (\d) coins and has "
    for opened, opening, name, verb, change in re.findall(line, read):
        if opened:
            assert opened not in has
            has[opened] = int(opening)
        else:
            has[name] += int(change) * (1 if verb == "gets" else -1)
            said.append(str(has[name]))
    return said


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("people, changes, distance", [(1, 0, 0), (3, 1, 40), (4, 3, 7)])
def test_accounts_can_be_kept_from_the_text(
    folder: Path, held_out: bool, people: int, changes: int, distance: int
) -> None:
    given = dict(people=people, changes=changes)
    task = Ledger(folder, held_out)
    stream = task.sample(4, distance, torch.Generator().manual_seed(0), **given)
    assert stream.input_ids.shape[1] == task.length(distance, **given)
    columns = stream.answers[0].nonzero()[:, 0].tolist()
    assert (stream.answers == stream.answers[0]).all() and len(columns) == 2 * people * (changes + 1)
    assert stream.scored[0].nonzero()[:, 0].tolist() == columns[2 * people * changes :][:2]
    for row in stream.input_ids:
        assert text_of(folder, row).startswith("Ledger:\n")
        said = [text_of(folder, row[tens : tens + 2]) for tens in columns[::2]]
        assert said == balances(text_of(folder, row[: columns[-1] + 1]))
        asked = text_of(folder, row).rsplit("\nLater:\n", 1)[1]
        assert len(set(re.findall(r"Then (\w+) ", asked))) == people


def test_layout(folder: Path) -> None:
    """Prompt, notes, `distance` tokens of the text, questions; the filler alone is new at another distance."""
    task = Notes(folder)
    far, near = (task.sample(4, distance, torch.Generator().manual_seed(0)).input_ids for distance in (30, 0))
    start = notes.NOTES.prompt.length + 3 * notes.NOTE.length
    assert torch.equal(torch.cat([far[:, :start], far[:, start + 30 :]], 1), near)
    text = notes.filler_text(held_out=False)
    assert len({tuple(row) for row in far.tolist()}) == 4
    for row in far:
        assert text_of(folder, row[: notes.NOTES.prompt.length]) == notes.NOTES.prompt.text
        assert text_of(folder, row[start : start + 30]) in text
        assert len(set(re.findall(r" of (\w+) is", text_of(folder, row[:start])))) == 3


def test_the_evaluation_has_names_things_and_text_of_its_own(folder: Path) -> None:
    training, evaluation = (notes.words_of(folder, notes.NOTES, held_out) for held_out in (False, True))
    for words in ("names", "things"):
        ours, theirs = (set(getattr(x, words).tolist()) for x in (training, evaluation))
        assert not ours & theirs and len(ours) > 3 * len(theirs) > 30
    ours, theirs = (set(notes.filler_text(held_out).split("\n")) for held_out in (False, True))
    assert not ours & theirs and len(ours) > len(theirs) > 50
    settings = Settings.of("notes", folder)
    names = set(re.findall(r" of (\w+) is", "".join(text_of(folder, row) for row in settings.held_out(0).input_ids)))
    assert names <= set(notes.words_in(notes.NAMES, held_out=True))


@pytest.mark.parametrize("kind", [notes.NotesOfAnyWord, notes.NotesOfMixedWords])
def test_any_word_is_for_training_alone(folder: Path, kind: type[Notes]) -> None:
    """Training has more words, none of them one that is asked for; the evaluation has the same streams."""
    wide, narrow = kind(folder), Notes(folder)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for here, there in zip(*(task.held_out.sample(4, 9, x) for task, x in zip((wide, narrow), generators))):
        assert torch.equal(here, there)
    for pool in ("names", "things"):
        few, many, asked = (set(getattr(task.words, pool).tolist()) for task in (narrow, wide, wide.held_out))
        assert len(many - few) >= 3 and few < many and not many & asked
        read = [text_of(folder, torch.tensor([token])) for token in many]
        assert all(re.fullmatch(r" [A-Z][a-z]+" if pool == "names" else r" [a-z]+", word) for word in read)
    read = [text_of(folder, row) for row in wide.sample(4, 9, generators[0]).input_ids]
    assert all(re.search(r"The number of [a-z]+ of [A-Z][a-z]+ is \d\d\.", text) for text in read)


def test_half_of_mixed_rows_are_of_one_kind(folder: Path) -> None:
    task, generator = notes.NotesOfMixedWords(folder), torch.Generator().manual_seed(0)
    chosen = task.chosen(torch.arange(1000), 10, 4000, generator, 3)
    alike = (chosen < 10).all(1)
    assert abs(alike.float().mean() - 0.5) < 0.03
    assert (chosen.sort(1).values.diff(dim=1) > 0).all()
    assert set(chosen[alike].flatten().tolist()) == set(range(10)) and chosen[~alike].float().mean() > 400


def test_what_a_tokenizer_must_do(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, left_out="Tom")
    with pytest.raises(ValueError, match="as SmolLM2's does: ' Tom' has 3 tokens, not 1"):
        Notes(tmp_path).sample(1, 0, torch.Generator())
    with pytest.raises(ValueError, match=r"call opened\(folder\) first"):
        TASKS["notes"].sample(1, 0, torch.Generator())
    with pytest.raises(ValueError, match="facts must be 1 to"):
        TASKS["notes"].chance(facts=40)
    with pytest.raises(ValueError, match="people must be 1 to .* and changes 0 to 3"):
        TASKS["ledger"].chance(changes=4)


def evidence(*arguments: object) -> None:
    """The command, in this process, since a new one takes long."""
    path = Path(__file__).parents[1] / "benchmarks" / "evidence" / "__main__.py"
    with patch.object(sys, "argv", ["evidence", *map(str, arguments)]):
        runpy.run_path(str(path), run_name="__main__")


def test_arms_run_and_are_reported(folder: Path, tmp_path: Path) -> None:
    """Rows and controls as of the other tasks; the gate does not ask of a checkpoint what it asks of a trained base."""
    arms = ["base, full cache", "base, windowed", "LoRA, full cache", "PTE"]
    command = ["--task", "notes", "--checkpoint", folder, "--output", tmp_path, "--seeds", 0, "--processes", 1]
    evidence(*command, "--quick", "--evaluated", 8, "--arms", *arms)
    rows = list(csv.DictReader((tmp_path / "notes.csv").open()))
    # Three distances and one beyond; on the way two distances at five steps; PTE also with two controls at two.
    assert len(rows) == 4 * 4 + 2 * 5 * 2 + 2 * 2
    dtype = rows[0].get("base_dtype", "float32")  # told where it is not float32
    assert dtype == Notes.settings["base_dtype"] and rows[0]["scaling"] == "0.5" and "base" not in rows[0]
    said = (tmp_path / "README.md").read_text()
    assert (
        "a checkpoint that was not trained on this task" in said and "Upper line: LoRA with the full cache, at" in said
    )
    assert "(a uniform guess: 0.01): passed" in said and "states zeroed, 24" in said
    with pytest.raises(SystemExit, match="that of notes is a checkpoint"):
        evidence(*command, "--hidden-size", 128)
    with pytest.raises(SystemExit, match="the base of recall is trained here"):
        evidence("--task", "recall", *command[2:])


def test_a_base_is_taught_before_the_arms(folder: Path, tmp_path: Path) -> None:
    """By a LoRA that is merged, which the checkpoint's own folder does not see; one that is killed leaves nothing."""
    base = tmp_path / "bases"
    command = ["--task", "ledger_taught", "--base", base, "--checkpoint", folder, "--output", tmp_path, "--quick"]
    command += ["--seeds", 0, "--processes", 1, "--evaluated", 8, "--arms", "base, full cache", "base, windowed"]
    before = load_file(folder / "model.safetensors")
    merge = patch("peft.tuners.lora.LoraModel.merge_and_unload", side_effect=KeyboardInterrupt)
    with merge, pytest.raises(KeyboardInterrupt):
        evidence(*command)
    assert not list(base.iterdir())
    evidence(*command)
    taught = load_file(base / "ledger_taught" / "model.safetensors")
    assert all(torch.equal(before[name], x) for name, x in load_file(folder / "model.safetensors").items())
    changed = {name for name, x in taught.items() if not torch.equal(x, before[name].to(x))}
    assert changed == {name for name in taught if re.search("[qkvo]_proj", name)}
    untaught = ["ledger" if word == "ledger_taught" else word for word in command]
    evidence(*untaught)
    after, was = (
        sum(float(row["nll"]) for row in csv.DictReader((tmp_path / name).open()) if row["arm"] == "base, full cache")
        for name in ("ledger_taught.csv", "ledger.csv")
    )
    assert after < was - 0.3
    said = (tmp_path / "README.md").read_text()
    assert said.count("Gate: base with full cache") == 1 == said.count("The base is a checkpoint that was not trained")


def test_a_table_tells_streams_and_scaling_of_each_row(folder: Path, tmp_path: Path) -> None:
    """Also one that goes on from a table which told less."""
    command = ["--task", "notes", "--checkpoint", folder, "--output", tmp_path, "--seeds", 0, "--processes", 1]
    evidence(*command, "--quick", "--evaluated", 8, "--arms", "base, windowed")
    path = tmp_path / "notes.csv"
    before = [{k: v for k, v in row.items() if k != "streams"} for row in csv.DictReader(path.open())]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(before[0]))
        writer.writeheader()
        writer.writerows(before)
    evidence(*command, "--quick", "--evaluated", 8, "--arms", "PTE, scaling 2")
    rows = list(csv.DictReader(path.open()))
    old = [row for row in rows if row["arm"] == "base, windowed"]
    new = [row for row in rows if row["arm"] == "PTE, scaling 2"]
    assert old == [row | dict(streams="") for row in before]
    # A quarter of the streams on the way, and at the distance that no base was trained for.
    assert {(row["step"] == "20" and row["distance"] != "64", row["streams"]) for row in new} == {
        (True, "8"),
        (False, "2"),
    }
    assert {row["scaling"] for row in new} == {"2.0"}


def test_rl_asks_for_the_digits(folder: Path, tmp_path: Path) -> None:
    """Prompts are a stream's text up to the first number that is scored, and split as the stream is; it runs."""
    settings = Settings.of("ledger", folder)
    tokenizer = rl.tokenizer_of(settings.streams, folder)
    for row in rl.problems(settings, tokenizer, size=8, seed=0):
        before, asked = row["prompt"].split("\nLater:\n")
        name, verb, change = re.fullmatch(r"Then (\w+) (gets|loses) (\d) coins and has ", asked).groups()
        has = int(re.findall(rf"{name} (?:.* and )?has (\d\d) coins", before)[-1])
        assert int(row["answer"]) == has + int(change) * (1 if verb == "gets" else -1)
        assert len(tokenizer(row["answer"])["input_ids"]) == 2
    command = ["--task", "ledger", "--checkpoint", folder, "--output", tmp_path, "--seeds", 0, "--processes", 1]
    evidence(*command, "--quick", "--rl", "--arms", "PTE", "--evaluated", 8)
    rows = list(csv.DictReader((tmp_path / "rl_ledger.csv").open()))
    assert [row["step"] for row in rows if row["reward"]] == ["1", "2"]


def test_adapters_are_float32_over_a_bfloat16_base(folder: Path) -> None:
    settings = replace(Settings.of("notes", folder), base_dtype="bfloat16")
    for arm in ("LoRA, full cache", "LoRA, windowed, parameters of PTE", "PTE"):
        model = adapted(ARMS[arm], settings, seed=0)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} >= {torch.bfloat16}


def test_attention_transfer_comes_before_the_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the error of attention smaller on other streams, too; training without labels runs after it."""
    few = dict(steps=1, batch_size=4, trained_distance=8, distances=(0, 20), num_evaluated=4, learning_rate=1e-3)
    settings = replace(Settings.of("notes", folder), **few)
    arm = replace(ARMS["PTE"], transfer=6, distilled=True)
    stream = settings.held_out(20)
    errors, losses = [], []

    def error(model: torch.nn.Module) -> float:
        return attention_loss(model, stream.input_ids, prompt_lengths=settings.streams.prompt_length).item()

    model = adapted(arm, settings, seed=0)
    errors.append(error(model))
    for step in supervised(model, settings, 0, arm):
        losses.append(step.loss)
        errors.append(error(model))
    assert len(losses) == 1 and errors[1] < 0.97 * errors[0]
    monkeypatch.setitem(ARMS, "PTE", arm)
    rows = run_arm("PTE", 0, settings)
    assert rows[-1]["train_loss"] == pytest.approx(losses[0], abs=1e-3)


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """From its last evaluation, and with the rows of an uninterrupted run; nothing is left when it has ended."""
    few = dict(steps=8, batch_size=2, trained_distance=8, distances=(0, 20), num_evaluated=8)
    settings = replace(Settings.of("notes", folder), **few, unfinished=tmp_path)

    def rows() -> list[str]:
        ours = run_arm("PTE", 0, settings)
        return [str({key: value for key, value in row.items() if key != "seconds"}) for row in ours]

    clip, whole = torch.nn.utils.clip_grad_norm_, rows()
    steps: list[torch.Tensor] = []

    def until_the_sixth(*arguments: object) -> torch.Tensor:
        steps.append(clip(*arguments))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return steps[-1]

    with patch.object(torch.nn.utils, "clip_grad_norm_", until_the_sixth):
        with pytest.raises(KeyboardInterrupt):
            rows()
        assert list(tmp_path.iterdir())
        assert rows() == whole and len(steps) == 6 + 4
    assert not list(tmp_path.iterdir())

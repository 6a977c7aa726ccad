"""The warm start: the whole script on a tiny checkpoint, killed and resumed, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import tiny_model, with_adapter
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import past_the_window
import warm_start
from peft_pte import sequence_divergence

ARMS = ["base, full cache", "base, windowed", "PTE", "PTE, states zeroed", "PTE, states swapped"]


def tokenizer() -> PreTrainedTokenizerFast:
    """w3 to w60 are words, each the token of its number."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 61)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def words(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(10, 61, (count,), generator=generator).tolist())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", torch.float32, num_hidden_layers=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def options(base: Path, data: Path, output: Path, *more: object) -> list[str]:
    sizes = [
        "--window-size",
        6,
        "--window-sizes",
        4,
        8,
        "--rank",
        4,
        "--steps",
        4,
        "--batch-size",
        4,
        "--save-steps",
        2,
    ]
    given = ["--model", base, "--data", data, "--output", output, "--max-new-tokens", 12, "--learning-rate", 0.01]
    return list(map(str, [*given, *sizes, *more]))


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_run_ends_with_the_same_adapter_and_a_table(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of all kinds that have no template; those that are prompts only are completed by the base."""
    rows: list[dict[str, Any]] = [dict(text=words(i, 24)) for i in range(8)]
    rows += [dict(prompt=words(i, 4), completion=words(i + 1, 20)) for i in range(8)]
    rows += [dict(prompt=words(i, 3 + i % 3)) for i in range(4)]
    held_out = [dict(text=words(90 + i, 26 + i)) for i in range(3)]
    held_out += [dict(prompt=words(i, 4 + i), completion=words(i, 12), answer="w7") for i in range(2)]
    data, eval_data = write(tmp_path / "data.jsonl", rows), write(tmp_path / "eval.jsonl", held_out)
    whole, killed = (options(base, data, tmp_path / name, "--eval-data", eval_data) for name in ("whole", "killed"))
    warm_start.main(whole)
    said = capsys.readouterr().out
    made = warm_start.make_trainer

    def with_kill(*args: Any) -> Any:
        trainer = made(*args)
        trainer.add_callback(Killed())
        return trainer

    with patch.object(warm_start, "make_trainer", with_kill), pytest.raises(KeyboardInterrupt):
        warm_start.main(killed)
    assert not (tmp_path / "killed" / "results.json").exists()
    warm_start.main([*killed, "--resume"])

    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any("untrained" in name for name in one)
    tables = [list(csv.DictReader((tmp_path / name / "table.csv").open())) for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    bands = {
        name: [row["distance"] for row in tables[0] if (row["rows"], row["arm"]) == (name, "PTE")]
        for name in ("rows", "rows with answers")
    }
    assert bands == {"rows": ["0-3", "3-6", "6-12", "12-24"], "rows with answers": ["0-3", "3-6"]}
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert list(results["accuracy"]["rows with answers"]) == ARMS
    # Keys and values of the longest row; of the prompt's 4 tokens and of 6 thoughts at most, with states of rank 4.
    assert results["cache_bytes"]["tokens"] == 28 and results["cache_bytes"]["full"] == 28 * 2 * 16 * 4
    assert 4 * 2 * 16 * 4 < results["cache_bytes"]["bounded"] < 14 * 2 * 16 * 4
    assert (tmp_path / "whole" / "plot.png").stat().st_size > 1000
    assert "rows: KL to the base with its full cache, by tokens after the first eviction" in said
    assert all(f"\n{arm} " in said for arm in ARMS)


@pytest.mark.parametrize("prefix", ["prompt", 2])
def test_what_the_table_counts(prefix: str | int) -> None:
    """Each arm is what it says, and bands share out the tokens that `sequence_divergence` compares."""
    base = tiny_model("llama", torch.float32, num_hidden_layers=1)
    model = with_adapter(base, window_size=6, retained_prefix=prefix, eviction_ratio=0.5)
    lengths = [2, 5, 3, 4]
    rows = [
        dict(input_ids=torch.arange(length + 20 + i).add(3 * i).remainder(50).add(3).tolist(), prompt_length=length)
        for i, length in enumerate(lengths)
    ]
    given = warm_start.arguments(["--model", "m", "--data", "d", "--window-size", "6", "--batch-size", "3"])
    given.retained_prefix = prefix
    evaluation = past_the_window.Evaluation(model, tokenizer(), given)
    table = evaluation.by_distance(rows, "rows")
    expected = {"PTE": 0.0, "base, windowed": 0.0}
    count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            found = sequence_divergence(model, ids, prompt_lengths=row["prompt_length"])
            with model.disable_adapter():
                windowed = sequence_divergence(model, ids, prompt_lengths=row["prompt_length"])
        expected["PTE"] += found.kl.sum().item()
        expected["base, windowed"] += windowed.kl.sum().item()
        count += int(found.counted.sum())
    for arm in ARMS:
        assert sum(row["tokens"] for row in table if row["arm"] == arm) == count
    for arm, total in expected.items():
        assert sum(row["tokens"] * row["kl"] for row in table if row["arm"] == arm) == pytest.approx(total, rel=1e-4)
    kl = {(row["arm"], row["distance"]): row["kl"] for row in table}
    assert kl["base, full cache", "0-3"] == 0 and kl["PTE", "6-12"] != kl["PTE, states zeroed", "6-12"]
    # From the first eviction on states are others; what is predicted before it is not in the table.
    assert kl["PTE", "0-3"] != kl["PTE, states zeroed", "0-3"]
    assert kl["PTE", "0-3"] != kl["PTE, states swapped", "0-3"] != kl["PTE, states zeroed", "0-3"]
    # A row that is alone has no other one's states.
    alone = evaluation.by_distance(rows[:1], "rows")
    assert {row["arm"] for row in alone} == {*ARMS} - {"PTE, states swapped"}


def test_answers_are_words_and_follow_what_stands_before_them() -> None:
    assert past_the_window.contains("It is 47.", "47") and not past_the_window.contains("It is 147.", "47")
    tokens = tokenizer()
    text = dict(text="w8 w9 w7 w8 is w7 w6", answer="w7")
    assert past_the_window.question(text, tokens) == tokens("w8 w9 w7 w8 is")["input_ids"]
    assert past_the_window.question(dict(prompt="w8 w9", completion="w7", answer="w7"), tokens) == [8, 9]


@pytest.mark.parametrize(
    "lines, said",
    [
        ('{"text": "w5"}\n{"question": "w5"}', "line 2: must have `text`, `prompt` and `completion`"),
        ('{"text": "w5"', "line 1: no JSON"),
        ('{"text": "w5"}', "has 1 rows"),
        ('{"text": "w5 w6", "answer": "w7"}', "line 1: `answer` is 'w7', which must stand in `text`"),
        ('{"text": "w5 w7", "answer": "w7"}', "--retained-prefix"),
    ],
)
def test_data_that_cannot_be_used_is_refused_first(tmp_path: Path, lines: str, said: str) -> None:
    """Before the checkpoint is loaded, which is not there."""
    (tmp_path / "data.jsonl").write_text(lines)
    with pytest.raises(SystemExit) as error:
        warm_start.main(options(tmp_path / "none", tmp_path / "data.jsonl", tmp_path / "out"))
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_a_fifth_of_the_steps_is_attention_transfer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them where parameters may be sharded, so that one command serves all ways to launch."""
    row = dict(text=words(0, 20))

    def steps(*more: object) -> int:
        given = options(base, tmp_path / "none", tmp_path / "out", "--retained-prefix", 2, "--steps", 10, *more)
        return warm_start.make_trainer(warm_start.arguments(given), [row]).args.attention_steps

    assert [steps(), steps("--attention-steps", 7)] == [2, 7]

    class Sharded(warm_start.PTEDistillationTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.is_fsdp_enabled = True

    monkeypatch.setattr(warm_start, "PTEDistillationTrainer", Sharded)
    assert [steps(), steps("--attention-steps", 7)] == [0, 7]


def test_options_that_cannot_be_used_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*given: object) -> str:
        with pytest.raises(SystemExit) as error:
            warm_start.main(list(map(str, given)))
        return capsys.readouterr().err + str(error.value)

    data = write(tmp_path / "data.jsonl", [dict(text=words(i, 9)) for i in range(4)])
    assert "--model and --data go together" in refusal("--model", base)
    assert "there is no file" in refusal("--model", base, "--data", tmp_path / "none.jsonl")
    assert "no checkpoint" in refusal(*options(base, data, tmp_path / "out", "--resume"))
    assert "PTEConfig has no 'wirte_gate'" in refusal("--config", "wirte_gate=true")
    assert "'write_gate' is not NAME=VALUE" in refusal("--config", "r=4", "write_gate")
    fields = warm_start.arguments(["--config", "write_gate=true", "pte_alpha=9", "init_weights=attention"]).config
    given = dict(write_gate=True, pte_alpha=9, init_weights="attention")
    assert dict(fields) == dict(warm_start.DEMO["config"]) | given
    assert warm_start.arguments(["--model", "m", "--data", "d", "--config", "r=4"]).config == [("r", 4)]
    assert "--steps is 0, but must be at least 1" in refusal(*options(base, data, tmp_path / "out", "--steps", 0))
    assert "--checkpoint is for the default model" in refusal(*options(base, data, tmp_path, "--checkpoint", "x"))
    with pytest.raises(ValueError, match="`window_sizes` is"):
        warm_start.main(options(base, data, tmp_path / "out", "--window-sizes", 8, 4))
    with pytest.raises(ValueError, match="No row has more than"):
        warm_start.main(options(base, data, tmp_path / "out", "--window-sizes", 30, 40))


def test_without_arguments_it_is_the_packaged_checkpoint_on_real_text() -> None:
    """Sizes for two cores; no paragraph and no note is on both sides, and every question can be cut off."""
    given = warm_start.arguments([])
    rows, groups = warm_start.load_rows(given)
    assert (given.window_size, given.retained_prefix) == (32, 4) and list(groups) == ["text", "notes"]
    assert warm_start.arguments(["--window-size", "48"]).window_size == 48
    texts = {row["text"] for row in rows}
    notes = [row["text"] for row in rows if row["text"].startswith("Notes:")]
    assert len(rows) == given.steps * given.batch_size and 2 * len(notes) == len(rows) == 2 * len(set(notes))
    assert not any(row["text"] in texts for part in groups.values() for row in part)
    for row in groups["notes"]:
        assert row["text"].endswith(f" is {row['answer']}.") and row["text"].count(f"is {row['answer']}.") == 2

"""The evaluation of mathematics: all arms on a tiny checkpoint, killed and resumed, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

pytest.importorskip("math_verify", reason="grading needs math-verify: pip install peft-pte[evaluate]")

import evaluate_demo
import evaluate_math
import peft_pte
from controls import add_window
from evaluate_engines import WINDOW_ONLY, adapter_config
from peft_pte import PTEConfig

ROOT = Path(__file__).parents[1]
PROBLEMS = [("7 8 9 10", "5"), ("11 12 13", "6"), ("14 15 16 17 18 19", "7"), ("20", "8"), ("21 22", "9")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose words are numbers, an adapter of each kind, and problems."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model("llama", torch.float32, num_hidden_layers=1).save_pretrained(folder / "base")
    vocab = {"<pad>": 0, "<user>": 1, "<eos>": 2} | {str(i): i for i in range(3, 61)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m.content }} {% endfor %}{{ tail or '' }}"
    tokenizer.save_pretrained(folder / "base")
    # Checkpoints come with sampling settings of their own, which an evaluation must not take over.
    GenerationConfig(eos_token_id=2, repetition_penalty=5.0, do_sample=True, top_k=1).save_pretrained(folder / "base")
    config = dict(window_size=6, eviction_ratio=0.5)
    with_adapter(tiny_model("llama", torch.float32, num_hidden_layers=1), **config).save_pretrained(folder / "pte")
    with_adapter(
        tiny_model("llama", torch.float32, num_hidden_layers=1), state_update="none", **config
    ).save_pretrained(folder / "global-only")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama", torch.float32, num_hidden_layers=1), lora).save_pretrained(folder / "lora")
    lines = [json.dumps(dict(problem=problem, answer=answer)) + "\n" for problem, answer in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(lines))
    return folder


def options(folder: Path, output: Path, *more: object) -> list[str]:
    given = ["--model", folder / "base", "--data", folder / "problems.jsonl", "--output", output, "--system-prompt", ""]
    return list(map(str, [*given, "--max-new-tokens", 40, "--batch-size", 3, *more]))


def adapters(folder: Path) -> list[str]:
    return ["--adapter", *(f"{arm}={folder / arm}" for arm in ("lora", "global-only", "pte"))]


def lines(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "completions" / f"{name}.jsonl").read_text().splitlines()]


def expected(folder: Path, arm: str, window: int | None, prompt: str) -> tuple[str, int, bool]:
    """Text, number of tokens and whether it ended, of a greedy completion that is made by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    model.generation_config = GenerationConfig()
    if arm != "base":
        model = PeftModel.from_pretrained(model, folder / arm.removesuffix("-windowed"))
    if arm == "lora-windowed":
        add_window(model, PTEConfig(**WINDOW_ONLY))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = torch.tensor([[1, *tokenizer(prompt)["input_ids"]]])
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=2)
    if window is None:
        done = model.eval().generate(ids, pad_token_id=0, **arguments)
    else:
        with peft_pte.window(model.eval(), window, eviction_ratio=0.5):
            done = model.generate(ids, pad_token_id=0, **arguments)
    made = done[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), len(made), bool(made[-1] == 2)


def test_all_arms_say_what_generate_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every arm under every window, in padded batches, and the table. More arms may come later."""
    arms = ["lora", "lora-windowed", "global-only", "pte"]
    given = options(folder, tmp_path)
    evaluate_math.main([*given, "--arms", "base"])
    evaluate_math.main([*given, "--arms", *arms, *adapters(folder), "--window", "4", "8"])
    found = {}
    for arm in ("base", *arms):
        for window in (4, 8) if evaluate_math.ARMS[arm].bounded else (None,):
            name = arm if window is None else f"{arm}-{window}"
            for line in lines(tmp_path, name):
                made = expected(folder, arm, window, PROBLEMS[line["problem"]][0])
                assert (line["text"], line["tokens"], line["ended"]) == made, (name, line)
                assert (line["arm"], line["window"], line["sample"]) == (arm, window, 0)
            found[name] = [line["text"] for line in sorted(lines(tmp_path, name), key=lambda line: line["problem"])]
            assert len(found[name]) == len(PROBLEMS)
    assert len({str(texts) for texts in found.values()}) == len(found)  # no two arms are the same
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\n| base | full | 5 |") == 1 and text.count("\n| pte | ") == 2
    assert text.count("\n| pte, window 4 | ") == 4 and "Not complete" not in text
    assert (tmp_path / "report.png").stat().st_size > 1000
    # Of one sequence, keys and values of 2 heads of 8 numbers of 4 bytes; the last token of a batch is never stored.
    held = {
        name: max(json.loads(x)["cache_bytes"] for x in (tmp_path / "timings" / f"{name}.jsonl").open())
        for name in ("base", "pte-4", "pte-8")
    }
    tokens = {line["problem"]: line["tokens"] for line in lines(tmp_path, "base")}
    longest = max(7 + max(tokens[i] for i in (2, 0, 1)), 3 + max(tokens[i] for i in (4, 3))) - 1
    assert held["base"] == longest * 2 * 16 * 4
    assert held["pte-4"] < held["pte-8"] < held["base"]


KILL = """\
import os, signal, sys
import evaluate_math
write, count = evaluate_math.write_line, [0]
def write_line(file, row):
    count[0] += "text" in row
    if count[0] == {line}:
        file.write('{{"arm": "pte", "wind')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, row)
evaluate_math.write_line = write_line
evaluate_math.main(sys.argv[1:])
"""


@pytest.mark.parametrize("sampling", [["--samples", "1"], ["--samples", "3", "--temperature", "1.5", "--top-p", "0.9"]])
def test_a_killed_run_has_the_lines_of_a_whole_one(folder: Path, tmp_path: Path, sampling: list[str]) -> None:
    """Killed with SIGKILL in the middle of a line, in the middle of a batch."""
    both = [*sampling, "--arms", "pte", "--adapter", f"pte={folder / 'pte'}", "--window", "4"]
    whole, killed = (options(folder, tmp_path / name, *both) for name in ("whole", "killed"))
    evaluate_math.main(whole)
    script = KILL.format(line=5)
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT / 'examples'}:{ROOT}")
    done = subprocess.run([sys.executable, "-c", script, *killed], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    path = tmp_path / "killed" / "completions" / "pte-4.jsonl"
    assert path.read_text().count("\n") == 4 and path.read_text().endswith('"wind')
    # Another process made them: a table of what there is can be drawn from the lines alone.
    evaluate_math.main(["--output", str(tmp_path / "killed"), "--report"])
    assert "**Not complete**: pte, window 4" in (tmp_path / "killed" / "report.md").read_text()
    evaluate_math.main(killed)
    assert path.read_bytes() == (tmp_path / "whole" / "completions" / "pte-4.jsonl").read_bytes()
    evaluate_math.main(killed)  # nothing is missing
    assert path.read_bytes() == (tmp_path / "whole" / "completions" / "pte-4.jsonl").read_bytes()


def test_samples_differ_and_batches_have_seeds_of_their_own(folder: Path, tmp_path: Path) -> None:
    def texts(name: str, *more: object) -> list[str]:
        evaluate_math.main(options(folder, tmp_path / name, "--samples", 3, "--temperature", 1.5, *more))
        return [line["text"] for line in lines(tmp_path / name, "base")]

    first = texts("first")
    assert len(set(first)) == len(first) == 15
    assert texts("again") == first and texts("other", "--seed", 100) != first


@pytest.mark.parametrize(
    "more, said",
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--max-new-tokens", "50"], "max_new_tokens was 40 and is 50"),
        (["--system-prompt", "30"], "system_prompt was '' and is '30'"),
        (["--limit", "2"], "problem_count was 5 and is 2"),
        (["--eviction-ratio", "0.25"], "eviction_ratio was 0.5 and is 0.25"),
        (["--adapter", "pte={folder}/other"], "adapter of pte was"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(
    folder: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    if not (folder / "other").exists():
        base = tiny_model("llama", torch.float32, num_hidden_layers=1)
        with_adapter(base, seed=2, window_size=6, eviction_ratio=0.5).save_pretrained(folder / "other")
    given = options(folder, tmp_path, "--arms", "pte", "--adapter", f"pte={folder / 'pte'}", "--window", 4)
    job = evaluate_math.Job(evaluate_math.arguments(given))
    evaluate_math.agree(evaluate_math.settings_of(job.options, job), tmp_path / "settings.json")
    with pytest.raises(SystemExit, match="holds completions of other settings") as error:
        evaluate_math.main([*given, *(text.format(folder=folder) for text in more)])
    assert said in str(error.value) and not (tmp_path / "completions").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--arms", "pte", "--window", "4"], "--arms pte: give its adapter, --adapter pte=PATH"),
        (["--arms", "lora-windowed", "--window", "4"], "--arms lora-windowed: give its adapter, --adapter lora=PATH"),
        (["--arms", "pte", "--adapter", "pte={folder}/pte"], "--window is []"),
        (["--window", "4"], "--window is [4]"),
        (
            ["--arms", "pte", "--adapter", "pte={folder}/pte", "--window", "0"],
            "`window_size` is 0",
        ),
        (["--arms", "pte", "--adapter", "pte={folder}/lora", "--window", "4"], "is of type LORA, but 'pte' needs"),
        (["--arms", "lora", "--adapter", "lora={folder}/pte"], "is of type PTE, but 'lora' needs"),
        (["--arms", "pte", "--adapter", "pte={folder}/global-only", "--window", "4"], "needs one that encodes"),
        (
            ["--arms", "global-only", "--adapter", "global-only={folder}/pte", "--window", "4"],
            "state_update='delta', but 'global-only' needs one that was trained with 'none'",
        ),
        (["--arms", "pte", "--adapter", "pte={folder}/none", "--window", "4"], "there is no adapter"),
        (["--adapter", "pte={folder}/pte"], "--adapter is given for pte, but not among --arms"),
        (["--adapter", "base={folder}/pte"], "ARM one of lora, lora-windowed, global-only, pte"),
        (["--samples", "2"], "all samples would be the same"),
        (["--samples", "0"], "--samples is 0, but must be at least 1"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0.0: must be"),
        (["--engine", "vllm", "--arms", "lora", "--adapter", "lora={folder}/lora"], "not with --engine vllm"),
        (["--data", "math501"], "'math501' is neither a file of JSON lines nor one of math500, aime24"),
        (["--report"], "there is no"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate_math.main([*options(folder, tmp_path / "out"), *(text.format(folder=folder) for text in more)])
    assert said in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "out").exists()


def test_prompts(folder: Path, tmp_path: Path) -> None:
    """System prompt, template, and what is given to the template; a tokenizer without one is refused."""

    def prompt(*more: object) -> list[int]:
        given = evaluate_math.arguments(options(folder, tmp_path, *more))
        return evaluate_math.prompt_tokens(evaluate_math.Problem("7 8", "5"), tokenizer, given)

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert prompt() == [1, 7, 8]
    assert prompt("--system-prompt", "30 31") == [1, 30, 31, 1, 7, 8]
    assert prompt("--template-arguments", '{"tail": "9"}') == [1, 7, 8, 9]
    assert prompt("--template", "plain", "--system-prompt", "30 31") == [30, 31, 7, 8]
    tokenizer.chat_template = None
    with pytest.raises(SystemExit, match="has no chat template. Give --template plain"):
        prompt()


@pytest.mark.parametrize("steps", [0, 2])
def test_adapters_of_the_demonstration(folder: Path, tmp_path: Path, steps: int) -> None:
    """Fresh or trained, each is one that its arm takes, and is not nothing."""
    asked = evaluate_math.arguments(options(folder, tmp_path / "out"))
    given = argparse.Namespace(steps=steps, batch_size=2, seed=0)
    for arm in evaluate_demo.configs():
        evaluate_demo.make_adapter(arm, folder / "base", tmp_path / arm, given, asked)
        adapter_config(arm, str(tmp_path / arm))
        weights = load_file(tmp_path / arm / "adapter_model.safetensors")
        last = [weight for name, weight in weights.items() if "pte_A" in name or "lora_B" in name]
        assert last and all(weight.any() for weight in last)

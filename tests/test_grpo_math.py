"""The GRPO example: the tiny job, its checkpoints and logs, and a real checkpoint with a file of problems."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import tiny_model, with_adapter

import tiny_chains
from tiny_chains import Chains

pytest.importorskip("trl", reason="TRL is an optional dependency: pip install peft-pte[grpo]")
pytest.importorskip("tensorboard", reason="the example logs to TensorBoard: pip install peft-pte[grpo]")

SCRIPT = Path(__file__).parents[1] / "examples" / "grpo_math.py"
LOGGED = {"reward", "completions/mean_length", "cache/evicted", "cache/state_norm", "memory/peak_mib"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module: a process of its own would load everything once more."""
    spec = importlib.util.spec_from_file_location("grpo_math", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["grpo_math"] = module
    spec.loader.exec_module(module)
    return module


def history(run: Path) -> list[dict]:
    """The steps that the newest checkpoint knows of."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "reward" in entry]


def tensorboard_tags(run: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set()
    for file in run.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    return tags


@pytest.mark.parametrize(("arm", "start"), [("pte", "distilled"), ("lora", "supervised")])
def test_tiny_job_logs_and_resumes(example: ModuleType, tmp_path: Path, arm: str, start: str) -> None:
    """A second call with --resume goes on from the last complete checkpoint, with the steps before it in the log."""
    tiny = ["--tiny", "--arm", arm, "--output", str(tmp_path), "--base-steps", "3", "--start-steps", "3"]
    tiny += ["--start", start, "--save-steps", "2"]
    tiny += ["--batch-size", "8", "--per-device-batch-size", "8", "--num-generations", "4"]
    example.main([*tiny, "--max-steps", "2"])
    run = tmp_path / f"{arm}-0"
    assert (run / "checkpoint-2" / "adapter_model.safetensors").exists()
    first = history(run)
    assert [entry["step"] for entry in first] == [1, 2]
    logged = LOGGED if arm == "pte" else LOGGED - {"cache/state_norm"}
    assert all(logged <= entry.keys() for entry in first)
    assert logged <= tensorboard_tags(run)
    # The other arm has PTE's cache, but what is saved is a LoRA.
    assert ("## Loading this adapter" in (run / "README.md").read_text()) == (arm == "pte")
    # An untrained model rarely stops: 32 tokens of which the last is not stored, and a window of 8 that empties by 4.
    assert 0 < first[0]["cache/evicted"] <= 24

    example.main([*tiny, "--max-steps", "4", "--resume"])
    assert history(run)[:2] == first and [entry["step"] for entry in history(run)] == [1, 2, 3, 4]
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(rows[step]["accuracy"] for step in (0, 2, 4))
    example.main(["--output", str(tmp_path), "--plot", str(tmp_path / "results.csv")])
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_lora_arm_checkpoints_what_it_trains(example: ModuleType, tmp_path: Path) -> None:
    """The bounded cache around LoRA must not hide LoRA from checkpoints."""
    options = example.arguments(["--tiny", "--arm", "lora"])
    model, other = (example.attach(tiny_model("llama", torch.float32), options) for _ in range(2))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = {name: parameter for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in trained.items())


def test_resume_without_a_checkpoint_is_refused(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint"):
        example.main(["--tiny", "--output", str(tmp_path), "--resume"])


def test_batch_size_is_checked_before_any_work(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert example.arguments(["--tiny"]).per_device_batch_size == 128
    with pytest.raises(SystemExit):
        example.main(["--tiny", "--output", str(tmp_path / "out"), "--per-device-batch-size", "256"])
    assert "--batch-size (256) must be a multiple of --per-device-batch-size (256) x 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tiny_job_in_two_processes(tmp_path: Path) -> None:
    """One of them makes the base, and both train on it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), "--tiny", "--output", str(tmp_path), "--base-steps", "3", "--start-steps", "3"]
    command += ["--batch-size", "16", "--num-generations", "4", "--max-steps", "1"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base-0", "pte-0"}
    rows = list(csv.DictReader((tmp_path / "pte-0" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1"] and float(rows[1]["evicted"]) > 0


def test_checkpoint_and_json_lines(example: ModuleType, tmp_path: Path) -> None:
    """What a user runs: a local checkpoint, problems in a file, answers checked by math-verify."""
    pytest.importorskip("math_verify", reason="the reward needs math-verify: pip install peft-pte[grpo]")
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    Chains.tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(dict(prompt=f"a +{i} ? a", answer=i)) for i in range(8)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    options = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "problems.jsonl")]
    options += ["--batch-size", "8", "--per-device-batch-size", "4", "--num-generations", "4", "--max-steps", "2"]
    options += ["--max-completion-length", "24", "--window-size", "8", "--rank", "4", "--num-global-tokens", "2"]
    example.main([*options, "--output", str(tmp_path / "out"), "--save-steps", "1", "--paper"])
    run = tmp_path / "out" / "pte-0"
    assert all(entry.keys() >= LOGGED for entry in history(run))
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["state_update"] == "sum" and config["window_size"] == 8


def test_an_adapter_is_gone_on_from(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it is trained, under another window if one is given."""
    saved = with_adapter(tiny_model("llama", torch.float32), window_size=6, eviction_ratio=0.5)
    saved.save_pretrained(tmp_path)
    for given, window in (([], 6), (["--window-size", "9"], 9)):
        options = example.arguments(["--adapter", str(tmp_path), *given])
        model = example.attach(tiny_model("llama", torch.float32), options)
        config = model.peft_config["default"]
        assert (config.window_size, config.eviction_ratio, config.r) == (window, 0.5, 5)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        expected = {name: parameter for name, parameter in saved.named_parameters() if parameter.requires_grad}
        assert trained.keys() == expected.keys()
        assert all(torch.equal(trained[name], parameter) for name, parameter in expected.items())
    for given, said in (
        (["--adapter", str(tmp_path), "--arm", "lora"], "leave out --tiny, --paper and --arm lora"),
        (["--adapter", str(tmp_path / "none")], "no folder with an adapter_config.json"),
    ):
        with pytest.raises(SystemExit):
            example.arguments(given)
        assert said in capsys.readouterr().err


def test_math_reward(example: ModuleType) -> None:
    pytest.importorskip("math_verify", reason="the reward needs math-verify: pip install peft-pte[grpo]")
    texts = [
        "so 3 + 4 = 7, \\boxed{7}",
        "Answer: $\\frac{1}{2}$",
        "Answer: 12",
        "I do not know",
        "1 + 1 = 2.\nAnswer: 3",
    ]
    completions = [[dict(role="assistant", content=text)] for text in texts]
    assert example.math_reward(completions, ["7", "0.5", "13", "4", "3"]) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_dapo_columns(example: ModuleType, tmp_path: Path) -> None:
    """DAPO's prompts are messages already and stay as they are; repeated problems are dropped."""
    row = dict(prompt=[dict(role="user", content="1 + 1?")], reward_model=dict(ground_truth="2", style="rule"))
    (tmp_path / "dapo.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    problems = example.load_problems(example.arguments(["--dataset", str(tmp_path / "dapo.jsonl")]))
    assert problems.to_list() == [dict(prompt=row["prompt"], answer="2")]


@pytest.mark.parametrize("arm", ["pte", "lora"])
def test_distilled_start(example: ModuleType, tmp_path: Path, arm: str) -> None:
    """Thoughts are the base's under its full cache, whatever the adapter says, and the start brings the arm nearer."""
    options = example.arguments(["--tiny", "--arm", arm])
    Chains.make_base(tmp_path / "base", 30, 0)
    tokenizer = example.AutoTokenizer.from_pretrained(tmp_path / "base", padding_side="left")
    torch.manual_seed(0)
    model = example.attach(example.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), options)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)  # any adapter that does something
    batch = next(tiny_chains.own_thoughts(model, tokenizer, seed=1, size=16, count=16))
    ids, mask, width = batch["input_ids"], batch["attention_mask"].bool(), batch["prompt_lengths"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert ids.shape[1] - width == 32 and bool(mask[:, width].all())  # a base that rarely stops
    for row, valid in zip(ids[:, width:], mask[:, width:]):
        thought = row[valid].tolist()
        assert tokenizer.eos_token_id not in thought[:-1] and not valid[len(thought) :].any()
    base = example.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    batch = next(tiny_chains.own_thoughts(model, tokenizer, seed=1, size=128, count=128))
    with torch.no_grad():
        logits = base(batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1]).logits
    logprobs = logits.log_softmax(-1)[:, width - 1 :]
    taken = logprobs.gather(-1, batch["input_ids"][:, width:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    thoughts = batch["attention_mask"][:, width:].bool()
    assert abs(float((-taken - entropy)[thoughts].mean())) < 0.05  # drawn from the base's distribution
    with torch.no_grad():
        before = float(tiny_chains.distillation_loss(model, **batch))
    tiny_chains.distilled_start(model, tokenizer, 16, seed=1)
    with torch.no_grad():
        assert float(tiny_chains.distillation_loss(model.eval(), **batch)) < 0.95 * before

"""`PTEDistillationTrainer`: an ordinary Trainer that needs text, and completions that survive a kill -9."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import tiny_model, with_adapter
from peft import PeftModel
from processes import TIMEOUT, start
from test_trl import tokenizer
from transformers import SchedulerType

from peft_pte import attention_loss, distillation_loss, window
from peft_pte.trainers import rows
from peft_pte.trainers.distillation import PTEDistillationConfig, PTEDistillationTrainer
from peft_pte.trainers.rows import Completions, Row, append_lines, read_lines, row_of

TEMPLATE = (
    "{% for m in messages %}{{ 'w7 ' if m.role == 'user' else 'w8 ' }}{{ m.content }}{{ ' w9 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w8' }}{% endif %}"
)


def words(seed: int, count: int) -> str:
    return " ".join(
        f"w{i}" for i in torch.randint(30, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


TEXTS = [dict(text=words(i, 20 + i % 5)) for i in range(24)]
PROMPTS = [dict(prompt=words(i, 3 + i % 3)) for i in range(10)]


def model_of(**config: Any) -> PeftModel:
    base = tiny_model("llama", torch.float32, num_hidden_layers=1, initializer_range=0.1)
    return with_adapter(base, **(dict(window_size=6, init_weights=True, pte_dropout=0.1) | config))


def trainer(folder: Path, train: Any = TEXTS, model: Any = None, **options: Any) -> PTEDistillationTrainer:
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        generation_batch_size=4,
        max_new_tokens=14,
    )
    return PTEDistillationTrainer(
        model_of() if model is None else model,
        PTEDistillationConfig(**(settings | options)),
        train_dataset=train,
        eval_dataset=TEXTS[:4],
        processing_class=tokenizer(),
    )


def logs(run: PTEDistillationTrainer, *names: str) -> list[tuple[float, ...]]:
    return [tuple(entry[name] for name in names) for entry in run.state.log_history if "loss" in entry]


def test_training_logging_and_resuming(tmp_path: Path) -> None:
    """The loss falls; the first step is that of the windowed base; a run that is resumed draws the same windows."""
    options = dict(train=TEXTS[:4], window_sizes=[3, 8], gradient_checkpointing=True)
    whole = trainer(tmp_path / "whole", **options)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.9 * before
    drawn = [size for (size,) in logs(whole, "window")]
    assert len(set(drawn)) > 2 and min(drawn) >= 3 and max(drawn) <= 8
    first, *rest = logs(whole, "kl", "kl_windowed_base", "gap_closed", "loss")
    assert first[0] == pytest.approx(first[1], rel=1e-5) and first[2] == pytest.approx(0, abs=1e-5)  # A = 0
    for kl, base, closed, loss in rest:
        assert kl == pytest.approx(loss, rel=1e-4) and closed == pytest.approx(1 - kl / base, abs=1e-4)
    evictions, norms = zip(*logs(whole, "evictions", "state_norm"))
    assert min(evictions) > 3 and min(norms) > 0
    evaluation = [entry for entry in whole.state.log_history if "eval_loss" in entry][-1]
    assert evaluation["eval_kl"] < evaluation["eval_kl_windowed_base"] and evaluation["eval_window"] == 6

    given = whole.evaluate(dict(few=TEXTS[:2]))["eval_few_loss"]
    assert given == whole.evaluate(TEXTS[:2])["eval_loss"]

    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logs(resumed, "loss", "window")[-4:] == logs(whole, "loss", "window")[-4:]
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))


def test_micro_batches_are_weighed_by_their_tokens(tmp_path: Path) -> None:
    """Micro-batches with different numbers of compared tokens are one batch of all their rows."""
    texts = [dict(text=words(i, 12 + 6 * (i % 4))) for i in range(8)]
    found = []
    for size, steps in ((8, 1), (2, 4)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
        run = trainer(tmp_path, texts, model_of(pte_dropout=0.0), divergence="mixed", **options)
        run.train()
        found.append(logs(run, "loss", "grad_norm", "kl", "kl_windowed_base", "evictions"))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-4)


def test_the_loss_is_that_of_the_function(tmp_path: Path) -> None:
    run = trainer(tmp_path, window_sizes=[4, 4], divergence="reverse", temperature=2.0, only_after_eviction=False)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    run.model.train()
    for dropout in run.model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    found = run.compute_loss(run.model, batch)
    with window(run.model, 4):
        expected = distillation_loss(run.model, *batch.values(), "reverse", 2.0, False)
    torch.testing.assert_close(found, expected)


def test_first_steps_may_be_attention_transfer(tmp_path: Path) -> None:
    """Their loss is that of the function, and what is learned makes the divergence smaller."""
    options = dict(attention_steps=20, max_steps=22, learning_rate=3e-3, window_sizes=[4, 4], train=TEXTS[:4])
    run = trainer(tmp_path, model=model_of(pte_dropout=0.0), **options)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    with window(run.model, 4):
        expected = attention_loss(run.model, *batch.values())
    torch.testing.assert_close(run.compute_loss(run.model.train(), batch), expected)
    run = trainer(tmp_path, model=model_of(pte_dropout=0.0), **options)
    before = run.evaluate()["eval_kl"]
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    for entry in entries[:20]:
        assert entry["attention_error"] == pytest.approx(entry["loss"], rel=1e-4) and "kl" not in entry
    assert entries[0]["loss"] == pytest.approx(expected.item(), rel=1e-4) and entries[19]["loss"] < entries[0]["loss"]
    assert "attention_error" not in entries[20] and entries[20]["kl"] < entries[20]["kl_windowed_base"]
    assert run.evaluate()["eval_kl"] < before


@pytest.mark.parametrize("step", [2, 6])
def test_both_parts_have_the_whole_schedule(tmp_path: Path, step: int) -> None:
    """Warm-up and decay come twice, also for a run that is resumed in either part; what follows a metric is left."""
    options = dict(attention_steps=4, max_steps=8, save_steps=2, learning_rate=1e-3, warmup_steps=2)
    whole = trainer(tmp_path / "whole", **options, save_total_limit=None)
    whole.train()
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)  # a step's own, before the schedule moves on
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert [entry["learning_rate"] for entry in resumed.state.log_history if "loss" in entry] == rates
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))
    by_metric = trainer(tmp_path, **options)
    by_metric.args.lr_scheduler_type = SchedulerType.REDUCE_ON_PLATEAU
    by_metric.create_optimizer()
    assert isinstance(by_metric.create_scheduler(8), torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_rows_of_all_kinds() -> None:
    tokens = tokenizer()
    tokens.chat_template = TEMPLATE
    user, answer = dict(role="user", content="w50 w51"), dict(role="assistant", content="w55 w56")
    chat = Row([7, 50, 51, 9, 8], [55, 56, 9])
    cases: list[tuple[dict[str, Any], Row]] = [
        (dict(text="w40 w41 w42 w43"), Row([40, 41, 42], [43])),
        (dict(text="w40 w41"), Row([40, 41], [])),
        (dict(prompt="w40 w41", completion="w42"), Row([40, 41], [42, 2])),
        (dict(prompt="w40 w41"), Row([40, 41], None)),
        (dict(prompt=[user], completion=[answer]), chat),
        (dict(prompt=[user], completion=answer["content"]), chat),
        (dict(prompt=[user]), Row(chat.prompt, None)),
        (dict(messages=[user, answer]), chat),
        (dict(messages=[user, answer, user]), Row([7, 50, 51, 9, 8, 55, 56, 9, 7, 50, 51, 9, 8], None)),
    ]
    for row, expected in cases:
        assert row_of(row, tokens, 3) == expected, row
    with pytest.raises(ValueError, match=r"A row has the columns \['question'\], but must have `text`, `prompt` and"):
        row_of(dict(question="w3"), tokens, 3)
    tokens.chat_template = TEMPLATE.replace("'w8 '", "'w5 '")
    with pytest.raises(ValueError, match="The chat template writes a conversation otherwise"):
        row_of(dict(messages=[user, answer]), tokens, 3)


# -------------------------------------------------------------------------------------------------------- completions


def make(path: Path, model: Any = None, **options: Any) -> Completions:
    store = Completions(path, dict(max_new_tokens=14, do_sample=True, seed=5) | options)
    prompts = [tokenizer()(row["prompt"])["input_ids"] for row in PROMPTS]
    store.make(model_of().train() if model is None else model, tokenizer(), prompts, batch_size=4, silent=True)
    return store


def killed_while_writing(path: Path) -> None:
    """A process that is gone when half of the second batch's lines are on the disk."""
    write, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        write(descriptor)
        calls.append(descriptor)
        if len(calls) == 2:
            size = path.stat().st_size
            os.truncate(path, size - len(path.read_bytes().splitlines(True)[-1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with patch("os.fsync", fsync):
        make(path)


def test_completions_of_a_killed_run_go_on(tmp_path: Path) -> None:
    """No line is lost, doubled or torn, nothing is made again, and the completions are those of a run that was not
    killed: samples of the base model under its full cache."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "completions.jsonl"
    make(whole)
    process = start(killed_while_writing, path)
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n") and len(read_lines(path)) == 7
    model = model_of()
    with patch("peft_pte.trainers.rows.complete", side_effect=rows.complete) as complete:
        make(path, model)
        assert complete.call_count == 2  # of three batches
        make(path, model)
        assert complete.call_count == 2
        assert path.read_bytes() == whole.read_bytes() and len(read_lines(path)) == len(PROMPTS)
        make(path, model, seed=6)  # something else
        assert complete.call_count == 5
    prompt = tokenizer()(PROMPTS[4]["prompt"])["input_ids"]
    line = read_lines(whole)[4]
    assert line["completion"] == tokenizer().convert_tokens_to_ids(line["text"].split())
    greedy = make(tmp_path / "greedy.jsonl", model, do_sample=False).of(model, [prompt])[0]
    base = tiny_model("llama", torch.float32, num_hidden_layers=1, initializer_range=0.1)
    expected = base.generate(input_ids=torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0, len(prompt) :]
    assert greedy == expected.tolist() and len(greedy) > 6


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    model, tokens = model_of(), tokenizer()
    prompts = [tokens(row["prompt"])["input_ids"] for row in PROMPTS]
    options = dict(max_new_tokens=6, do_sample=False, seed=0)
    stores = [Completions(tmp_path / "completions.jsonl", options, rank, 2) for rank in range(2)]
    for store in stores:
        store.make(model, tokens, prompts, 4, silent=True)
    assert [len(read_lines(tmp_path / f"completions.{rank}.jsonl")) for rank in range(2)] == [6, 4]
    alone = Completions(tmp_path / "completions.jsonl", options)
    with patch("peft_pte.trainers.rows.complete") as complete:
        alone.make(model, tokens, prompts, 4, silent=True)
        assert complete.call_count == 0
    assert stores[0].of(model, prompts) == alone.of(model, prompts)


def test_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines.jsonl"
    assert read_lines(path) == []
    append_lines(path, [dict(a=1), dict(a="é\n")])
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [dict(a=1), dict(a="é\n")]
    append_lines(path, [dict(a=4)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [dict(a=1), dict(a="é\n"), dict(a=4)]


def test_prompts_are_completed_before_training(tmp_path: Path) -> None:
    """Also with the bounded model in train mode; rows keep their order among others."""
    mixed = [PROMPTS[0], TEXTS[0], PROMPTS[1]]
    run = trainer(tmp_path, mixed, max_steps=1, generation_kwargs=dict(do_sample=False, min_new_tokens=14))
    lines = read_lines(tmp_path / "completions.jsonl")
    ids = [tokenizer()(row[name])["input_ids"] for row, name in zip(mixed, ("prompt", "text", "prompt"))]
    assert [row["input_ids"] for row in run.train_dataset] == [
        ids[0] + lines[0]["completion"],
        ids[1],
        ids[2] + lines[1]["completion"],
    ]
    assert [row["prompt_length"] for row in run.train_dataset] == [len(ids[0]), 4, len(ids[2])]
    run.train()
    short = trainer(tmp_path, mixed, max_length=18, generation_kwargs=dict(do_sample=False, min_new_tokens=14))
    assert max(len(row["input_ids"]) for row in short.train_dataset) == 18


def test_bad_input(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(window_sizes=[8, 4]), r"`window_sizes` is \[8, 4\], but must be \[smallest, largest\]"),
        (dict(window_sizes=[8]), "`window_sizes` is"),
        (dict(divergence="jsd"), "`divergence` is 'jsd', but must be one of 'forward', 'reverse', 'mixed'"),
        (dict(temperature=0.0), "`temperature` is 0.0, but must be a positive number"),
        (dict(max_new_tokens=0), "`max_new_tokens` is 0, but must be an integer >= 1"),
        (dict(model=tiny_model("llama")), r"`model` \(LlamaForCausalLM\) has no PTE adapter"),
        (dict(window_sizes=[40, 50]), "No row has more than 20 tokens after what stays in the cache"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="`processing_class` is None"):
        PTEDistillationTrainer(model_of(), PTEDistillationConfig(output_dir=str(tmp_path), use_cpu=True), TEXTS)

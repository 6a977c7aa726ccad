"""TRL's trainers run with `peft_config=PTEConfig(...)` and no other change, on the policy that was sampled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import SIZES, tiny_model
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from peft_pte import PTECache, PTEConfig, sequence_logprobs, sequence_loss

trl = pytest.importorskip("trl", reason="TRL is an optional dependency: pip install peft-pte[trl]")
datasets = pytest.importorskip("datasets")

from peft_pte.hooks.border import batch_known  # noqa: E402
from peft_pte.replay.heads import first_labels  # noqa: E402
from peft_pte.replay.replay import replay  # noqa: E402
from peft_pte.trainers.grpo import PTEGRPOTrainer  # noqa: E402  (needs TRL)
from peft_pte.trainers.prompts import KnownPrompts  # noqa: E402

PTE = dict(task_type="CAUSAL_LM", r=4, num_global_tokens=3, window_size=8)
COMMON = dict(per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none", logging_steps=1, max_steps=2)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )


def base_model() -> torch.nn.Module:
    return tiny_model("llama", torch.float32, initializer_range=0.1)


def prompts() -> Any:
    """Prompts of different lengths."""
    rows = [" ".join(f"w{3 + (i * j) % 50}" for j in range(1, 3 + i % 5)) for i in range(16)]
    return datasets.Dataset.from_list([dict(prompt=row) for row in rows])


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


class Watch(trl.GRPOTrainer):
    """Compares the log-probabilities that TRL trains on with those of decoding the same tokens."""

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        border, wanted = inputs["prompt_ids"].shape[1], inputs["completion_mask"].bool()
        trained = self._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1] - border)[0]
        policy = self.accelerator.unwrap_model(model)
        rollout_mask = mask.clone()
        rollout_mask[:, border:] = 1  # generate goes on with pads after a row has stopped
        with torch.no_grad():
            cache, start, logits = PTECache(), 0, []
            for end in range(border, ids.shape[1]):
                step = dict(input_ids=ids[:, start:end], attention_mask=rollout_mask[:, :end], past_key_values=cache)
                logits.append(policy(**step).logits[:, -1])
                start = end
            sampled = torch.stack(logits, dim=1).log_softmax(-1).gather(-1, ids[:, border:, None])[..., 0]
            own, _ = sequence_logprobs(policy, ids, mask, border)
            with policy.disable_adapter():
                reference, _ = sequence_logprobs(policy, ids, mask, border)
        self.watched.append(
            dict(
                ratio=(trained - sampled)[wanted].exp(),
                own=(trained - own[:, border:])[wanted],
                reference=(inputs["ref_per_token_logps"] - reference[:, border:])[wanted],
                lengths=wanted.sum(1).tolist(),
                prompts=inputs["prompt_mask"].sum(1).tolist(),
                evicted=cache.num_evicted,
            )
        )
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grpo_trains_on_the_policy_that_it_samples(tmp_path: Path, checkpointing: bool) -> None:
    """Importance ratios are 1 for every token, in rows that stop early and for ragged prompts; the reference policy is
    the base model with its full cache."""
    torch.manual_seed(0)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-3,
        beta=0.04,
        gradient_checkpointing=checkpointing,
        **COMMON,
    )
    trainer = Watch(
        model=base_model(),
        processing_class=tokenizer(),
        reward_funcs=reward,
        args=arguments,
        train_dataset=prompts(),
        # A random A that acts, but not one that blows rounding up from step to step.
        peft_config=PTEConfig(**PTE, init_weights=False, pte_alpha=1),
    )
    trainer.watched = []
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(trainer.watched) == 2
    for watched in trainer.watched:
        assert (watched["ratio"] - 1).abs().max() <= 1e-5
        assert watched["own"].abs().max() <= 1e-5
        assert watched["reference"].abs().max() <= 1e-5
        assert max(watched["evicted"]) > 8 and len(set(watched["prompts"])) > 1
    assert any(len(set(watched["lengths"])) > 1 for watched in trainer.watched)
    log = trainer.state.log_history
    assert all(entry["kl"] > 0 for entry in log if "kl" in entry)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


def test_sft_on_completions(tmp_path: Path) -> None:
    """Prompt-completion data: loss, token accuracy and entropy are logged, and the loss falls."""
    rows = [dict(prompt="w5 w6 w7", completion=" ".join(f"w{8 + (i + j) % 4}" for j in range(20))) for i in range(32)]
    trainer = trl.SFTTrainer(
        model=base_model(),
        processing_class=tokenizer(),
        args=trl.SFTConfig(output_dir=str(tmp_path), learning_rate=3e-2, **(COMMON | dict(max_steps=8))),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**PTE),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert {"entropy", "mean_token_accuracy"} <= logs[0].keys()


@pytest.mark.parametrize("turns", [1, 2])
def test_assistant_only_sft_on_conversations(tmp_path: Path, turns: int) -> None:
    """The first assistant token is the border, and only assistant tokens count; what later turns mean is said."""
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w4 {{ m.content }} w5 {% else %}"
        "{% generation %}{{ m.content }} w2{% endgeneration %} {% endif %}{% endfor %}"
    )
    answer = " ".join(f"w{6 + j % 4}" for j in range(20))
    rows = [
        dict(messages=[dict(role="user", content=f"w{30 + i % 5} w7"), dict(role="assistant", content=answer)] * turns)
        for i in range(32)
    ]
    trainer = trl.SFTTrainer(
        model=base_model(),
        processing_class=words,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), learning_rate=3e-2, assistant_only_loss=True, **(COMMON | dict(max_steps=8))
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**PTE),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    assert bool((batch["labels"][:, :4] == -100).all()) and int((batch["labels"][0] != -100).sum()) == 21 * turns
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(
            sequence_loss(model, batch["input_ids"], batch["labels"], batch["attention_mask"]).item(), rel=1e-4
        )
    assert any("The labels have gaps" in str(w.message) for w in caught) == (turns > 1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert {"entropy", "mean_token_accuracy"} <= logs[0].keys()


def test_dpo_and_rloo_share_the_path(tmp_path: Path) -> None:
    """They run unchanged; on the first step DPO's policy with A = 0 differs from its full-cache reference by the
    window alone."""
    rows = [
        dict(prompt="w5 w6 w7", chosen=" ".join(f"w{8 + (i + j) % 4}" for j in range(20)), rejected="w20 w21 w22 " * 6)
        for i in range(16)
    ]
    dpo = trl.DPOTrainer(
        model=base_model(),
        processing_class=tokenizer(),
        args=trl.DPOConfig(output_dir=str(tmp_path / "dpo"), learning_rate=3e-2, **(COMMON | dict(max_steps=6))),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**PTE),
    )
    dpo.train()
    logs = [entry for entry in dpo.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["rewards/margins"] > 0
    rloo = trl.RLOOTrainer(
        model=base_model(),
        processing_class=tokenizer(),
        reward_funcs=reward,
        args=trl.RLOOConfig(
            output_dir=str(tmp_path / "rloo"), num_generations=4, max_completion_length=24, beta=0.04, **COMMON
        ),
        train_dataset=prompts(),
        peft_config=PTEConfig(**PTE),
    )
    before = {name: p.clone() for name, p in rloo.model.named_parameters() if p.requires_grad}
    rloo.train()
    assert all(entry["kl"] > 0 for entry in rloo.state.log_history if "kl" in entry)
    assert any(not torch.equal(p, before[name]) for name, p in rloo.model.named_parameters() if name in before)


def grpo(trainer: type, output: Path, model: Any = None, gradient: str = "full", **options: Any) -> Any:
    arguments = dict(num_generations=4, max_completion_length=24, learning_rate=1e-3, beta=0.04, temperature=0.9)
    torch.manual_seed(0)
    return trainer(
        model=base_model() if model is None else model,
        processing_class=tokenizer(),
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(output), seed=1, **(COMMON | arguments | options)),
        train_dataset=prompts(),
        peft_config=PTEConfig(**PTE, init_weights=False, pte_alpha=1, gradient=gradient) if model is None else None,
    )


def test_flat_grpo_trainer_is_trl_s_with_another_head(tmp_path: Path) -> None:
    """The same losses, KL and entropy as `trl.GRPOTrainer`, on the same rollouts, and ratios of 1."""
    runs = [grpo(kind, tmp_path / kind.__name__) for kind in (trl.GRPOTrainer, PTEGRPOTrainer)]
    logs = []
    for run in runs:
        torch.manual_seed(3)
        run.train()
        logs.append([entry for entry in run.state.log_history if "kl" in entry])
    for expected, actual in zip(*logs):
        for name in ("loss", "kl", "entropy", "reward", "completions/mean_length"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        assert abs(actual["importance_ratio/min"] - 1) <= 1e-5 and abs(actual["importance_ratio/max"] - 1) <= 1e-5


def test_flat_grpo_trainer_trains_truncated_with_several_inner_steps(tmp_path: Path) -> None:
    """Ratios are 1 on the first inner step of each rollout and not on the second."""
    options = dict(num_iterations=2, max_steps=4, learning_rate=1e-2, save_steps=2, save_total_limit=1)
    run = grpo(PTEGRPOTrainer, tmp_path, gradient="truncated", **options)
    run.train()
    assert [path.name for path in tmp_path.iterdir() if "README" not in path.name] == ["checkpoint-4"]
    logs = [entry for entry in run.state.log_history if "kl" in entry]
    for step, entry in enumerate(logs):
        far = max(abs(entry["importance_ratio/min"] - 1), abs(entry["importance_ratio/max"] - 1))
        assert far <= 1e-5 if step % 2 == 0 else far > 1e-4


def test_flat_grpo_trainer_takes_the_base_model_as_the_reference_of_a_ready_model(tmp_path: Path) -> None:
    ready = get_peft_model(base_model(), PTEConfig(**PTE, init_weights=False))
    assert "ref" in grpo(trl.GRPOTrainer, tmp_path / "trl", model=ready).model.peft_config
    ready = get_peft_model(base_model(), PTEConfig(**PTE, init_weights=False))
    run = grpo(PTEGRPOTrainer, tmp_path / "pte", model=ready)
    assert list(run.model.peft_config) == ["default"]
    run.train()
    assert all(entry["kl"] > 1e-4 for entry in run.state.log_history if "kl" in entry)  # from the base, not from itself


class Calculator:
    """An environment; its methods become tools, and the trainer runs the loop that `tools` are refused for."""

    def reset(self, **row: Any) -> None: ...

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one
            b: another
        """
        return a + b


@pytest.mark.parametrize(
    "arguments", [dict(tools=[Calculator.add]), dict(environment_factory=Calculator), dict(rollout_func=print)]
)
def test_flat_grpo_trainer_refuses_whatever_runs_a_loop_of_turns(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` is not supported with PTE: a loop of several"):
        PTEGRPOTrainer(
            model=base_model(),
            reward_funcs=reward,
            args=trl.GRPOConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=prompts(),
            processing_class=tokenizer(),
            peft_config=PTEConfig(**PTE),
            **arguments,
        )


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(), None),
        (dict(top_k=5, temperature=0.7, top_p=0.9), None),
        (dict(generation_kwargs=dict(min_p=0.05, max_new_tokens=24)), None),
        (dict(repetition_penalty=1.5), "repetition_penalty=1.5"),
        (dict(generation_kwargs=dict(no_repeat_ngram_size=2)), "no_repeat_ngram_size=2"),
    ],
    ids=str,
)
def test_importance_ratios_are_1_or_it_is_said_why_not(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = grpo(PTEGRPOTrainer, tmp_path, max_steps=1, **options)
    said = [str(w.message) for w in caught if "drawn from another distribution" in str(w.message)]
    assert [named in message for message in said] == ([True] if named else [])
    run.train()
    (entry,) = [entry for entry in run.state.log_history if "kl" in entry]
    far = max(abs(entry["importance_ratio/min"] - 1), abs(entry["importance_ratio/max"] - 1))
    assert far > 1e-2 if named else far <= 1e-5


@pytest.mark.parametrize(
    "option", ["compute_metrics", "label_smoothing_factor", "compute_loss_func"], ids=lambda name: name
)
def test_trainers_that_take_the_labels_away(tmp_path: Path, option: str) -> None:
    """Without the mixin the error names it; with it the model sees the border that the labels would have given."""
    rows = [dict(prompt="w5 w6 w7", completion=" ".join(f"w{8 + (i + j) % 4}" for j in range(20))) for i in range(8)]
    smoothing = dict(label_smoothing_factor=0.1) if option == "label_smoothing_factor" else {}
    functions = dict(
        compute_metrics=lambda prediction: dict(shape=prediction.predictions.shape[0]),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean(),
    )

    class Known(KnownPrompts, trl.SFTTrainer):
        pass

    for kind in (trl.SFTTrainer, Known):
        data = datasets.Dataset.from_list(rows)
        trainer = kind(
            model=base_model(),
            processing_class=tokenizer(),
            args=trl.SFTConfig(output_dir=str(tmp_path), per_device_eval_batch_size=8, **(COMMON | smoothing)),
            train_dataset=data,
            eval_dataset=data,
            peft_config=PTEConfig(**PTE, init_weights=False),
            **({option: functions[option]} if option in functions else {}),
        )
        if kind is trl.SFTTrainer:
            with pytest.raises(ValueError, match="from peft_pte.trainers.prompts import KnownPrompts"):
                trainer.train()
                trainer.evaluate()
            continue
        with patch("peft_pte.hooks.decoder.replay", wraps=replay) as replays:
            trainer.evaluate()
        batch = next(iter(trainer.get_eval_dataloader()))
        borders = [call.args[3] for call in replays.call_args_list]
        assert borders and all(torch.equal(border, first_labels(batch["labels"])) for border in borders)
        trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] > 0


def test_reward_models_know_their_prompts_from_pairs(tmp_path: Path) -> None:
    rows = [
        dict(
            chosen=f"w5 w6 w{50 + i} " + " ".join(f"w{40 + (i + j) % 4}" for j in range(20)),
            rejected=f"w5 w6 w{50 + i} " + "w30 w31 w32 " * 6,
        )
        for i in range(8)
    ]

    class Known(KnownPrompts, trl.RewardTrainer):
        pass

    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    trainer = Known(
        model=base,
        processing_class=tokenizer(),
        args=trl.RewardConfig(output_dir=str(tmp_path), learning_rate=3e-2, **(COMMON | dict(max_steps=6))),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**(PTE | dict(task_type="SEQ_CLS"))),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = trainer.prompt_lengths(batch)
    assert lengths.tolist() == [3] * 16
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_what_a_batch_says_holds_for_its_tokens_only() -> None:
    model = get_peft_model(base_model(), PTEConfig(**PTE, init_weights=False)).eval()
    ids = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    with batch_known(ids, torch.tensor([4, 9])), torch.no_grad():
        known = model(input_ids=ids.clone(), use_cache=False).logits
        with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
            model(input_ids=ids.flip(1), use_cache=False)
        said = model(input_ids=ids, prompt_lengths=12).logits  # whoever says it himself is heard
    with torch.no_grad():
        torch.testing.assert_close(known, model(input_ids=ids, prompt_lengths=[4, 9]).logits)
        torch.testing.assert_close(said, model(input_ids=ids, prompt_lengths=12).logits)
    with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
        model(input_ids=ids, use_cache=False)


def test_mixins_are_named_before_the_trainer() -> None:
    with pytest.raises(TypeError, match="name KnownPrompts before the Trainer"):
        type("Wrong", (trl.SFTTrainer, KnownPrompts), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(generation_kwargs=dict(num_beams=2)), "`num_beams=2` in `generation_kwargs`"),
        (dict(generation_kwargs=dict(prompt_lookup_num_tokens=2)), "`prompt_lookup_num_tokens` in `generation_kwargs`"),
        (dict(use_transformers_continuous_batching=True), "paged cache holds no thought states"),
        (dict(entropy_coef=0.1), "An entropy bonus"),
    ],
)
def test_flat_grpo_trainer_refuses_when_it_is_built(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(PTEGRPOTrainer, tmp_path, **options)
    with pytest.raises(ValueError, match="The model has no PTE adapter"):
        grpo(PTEGRPOTrainer, tmp_path, model=base_model())

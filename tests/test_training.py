"""Training: exact gradients through the replay, and `transformers.Trainer` as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative_error, tiny_model, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from test_policy import Case, cases, left_padded, right_padded
from transformers import Trainer, TrainingArguments

from peft_pte import PTECache, PTEConfig, sequence_logprobs, sequence_loss
from peft_pte.replay.segments import host_copy


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return named


def loss_of(case: Case, model: torch.nn.Module) -> torch.Tensor:
    ids, mask = right_padded(case)
    output = model(input_ids=ids, attention_mask=mask, prompt_lengths=case.prompts)
    weights = torch.linspace(0.5, 1.5, 61, dtype=torch.float64)  # any smooth function of all valid logits
    return (output.logits.log_softmax(-1)[mask.bool()] * weights).mean()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-10 * scale, name


@settings(max_examples=40)
@given(case=cases(), gradient=st.sampled_from(["full", "truncated"]), piece=st.sampled_from([1, 3, 128]))
def test_checkpointed_gradients_equal_plain_ones(case: Case, gradient: str, piece: int) -> None:
    """Every adapter parameter gets one; recomputing segments in the backward pass does not change it, nor does
    splitting the first one."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config, gradient=gradient).train()
    loss = loss_of(case, model)
    plain = gradients(model, loss)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if case.config["num_global_tokens"]:
        assert plain.keys() == trainable
    model.gradient_checkpointing_enable()
    with patch("peft_pte.replay.replay.SHORTEST_PIECE", piece):
        loss = loss_of(case, model)
    assert_same(gradients(model, loss), plain)


@pytest.mark.parametrize("update", ["sum", "delta"])
def test_truncated_gradients_equal_detaching_by_hand(update: str) -> None:
    """Cached keys and values are constants at segment borders; the chain of states is not."""
    config = dict(window_size=6, state_update=update, eviction_ratio=0.5)
    model = with_adapter(tiny_model("llama"), **config, gradient="truncated").train()
    ids = torch.randint(3, 61, (2, 25), generator=torch.Generator().manual_seed(0))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())

    truncated = gradients(model, loss(model(input_ids=ids, prompt_lengths=5).logits))
    cache, logits, start = PTECache(), [], 0
    for size in [5, 6] + [3] * 4 + [2]:
        logits.append(model(input_ids=ids[:, start : start + size], past_key_values=cache).logits)
        start += size
        if size != 5:  # the prompt and the first window are one segment
            for layer in cache.layers:
                layer.key_slots.data = layer.key_slots.data.detach()
                layer.value_slots.data = layer.value_slots.data.detach()
    assert_same(gradients(model, loss(torch.cat(logits, dim=1))), truncated)
    full = with_adapter(tiny_model("llama"), **config, gradient="full").train()
    exact = gradients(full, loss(full(input_ids=ids, prompt_lengths=5).logits))
    assert any((exact[name] - truncated[name]).abs().max() > 1e-6 for name in exact)


@pytest.mark.parametrize("trained", ["adapter", "head"])
def test_truncated_gradients_of_nothing_and_of_a_frozen_adapter(trained: str) -> None:
    """A loss that weighs nothing has zero gradients; where the adapter is frozen the rest is trained as ever."""
    model = with_adapter(tiny_model("llama"), window_size=6, gradient="truncated").train()
    if trained == "head":
        model.requires_grad_(False).base_model.model.model.norm.requires_grad_(True)
    ids = torch.randint(3, 61, (2, 25), generator=torch.Generator().manual_seed(0))
    found = []
    for way in (ordinary_autograd, nullcontext):
        for scale in (0, 1):
            with way():
                found.append(gradients(model, model(input_ids=ids, prompt_lengths=5).logits.sin().sum() * scale))
    assert not any(gradient.any() for gradient in (*found[0].values(), *found[2].values()))
    assert_same(found[3], found[1])
    assert any("norm.weight" in name for name in found[3]) == (trained == "head")


@contextmanager
def ordinary_autograd() -> Iterator[None]:
    """Truncated gradients by detaching at evictions, as is done for sharded parameters."""
    with patch("peft_pte.replay.replay.is_sharded", lambda parameters: True):
        yield


@settings(max_examples=40)
@given(case=cases(), piece=st.sampled_from([1, 3, 128]), of=st.sampled_from(["logits", "embeds", "hidden", "logprobs"]))
def test_second_pass_of_truncated_gradients_equals_ordinary_autograd(case: Case, piece: int, of: str) -> None:
    """For all parameters and input embeddings, with dropout, and a trained output head."""
    model = with_adapter(
        tiny_model(case.family, seed=case.seed), **case.config, gradient="truncated", pte_dropout=0.2
    ).train()
    model.base_model.model.lm_head.requires_grad_(True)
    ids, mask = right_padded(case)
    call = dict(attention_mask=mask, prompt_lengths=torch.tensor(case.prompts))
    weights = torch.linspace(0.5, 1.5, ids.shape[1], dtype=torch.float64)[:, None]
    found = []
    for way in (ordinary_autograd, nullcontext):
        torch.manual_seed(0)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        with (
            way(),
            patch("peft_pte.replay.replay.SHORTEST_PIECE", piece),
            patch("peft_pte.replay.chunks.CHUNK_TOKENS", 7),
        ):
            if of == "logprobs":
                value = sequence_logprobs(model, ids, **call)[0][..., None]
            elif of == "hidden":
                value = model(input_ids=ids, output_hidden_states=True, **call).hidden_states[1]
            elif of == "embeds":
                value = model(inputs_embeds=embeds, **call).logits
            else:
                value = model(input_ids=ids, **call).logits
            named = gradients(model, (value.sin() * weights * mask[..., None]).sum())
        found.append(named | ({} if embeds.grad is None else {"embeds": embeds.grad}))
    for name in found[1].keys() - found[0].keys():  # zero instead of none, where the loss does not depend on a layer
        assert not found[1].pop(name).any()
    assert_same(found[1], found[0])
    assert ("embeds" in found[1]) == (of == "embeds")


@pytest.mark.parametrize("head", [False, True])
def test_truncated_gradients_accumulate_scale_and_autocast(head: bool) -> None:
    """Two micro-batches, a scaled loss, bf16 autocast: what ordinary autograd gives."""
    model = with_adapter(tiny_model("llama", torch.float32), window_size=6, gradient="truncated").train()
    batches = [torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = []
    for way in (ordinary_autograd, nullcontext):
        model.zero_grad()
        for ids in batches:
            with way(), torch.autocast("cpu", dtype=torch.bfloat16):
                if head:
                    loss = -sequence_logprobs(model, ids, prompt_lengths=5)[0].mean()
                else:
                    loss = F.cross_entropy(model(input_ids=ids, prompt_lengths=5).logits.flatten(0, 1), ids.flatten())
            (loss * 1024).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    scale = max(g.abs().max() for g in found[0].values())
    for name, expected in found[0].items():
        assert expected.dtype == torch.float32
        assert (found[1][name] - expected).abs().max() <= 1e-2 * scale, name
    assert scale > 1


def test_training_with_an_integer_prefix_needs_no_border() -> None:
    """It is a replay, not a prefill: memory is that of the configuration."""
    model = with_adapter(tiny_model("llama"), window_size=6, retained_prefix=2, gradient="truncated").train()
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with patch("peft_pte.replay.segments.host_copy", side_effect=host_copy) as moved:
        output = model(input_ids=ids)
        actual = gradients(model, output.logits.sin().sum())
    assert output.past_key_values is None and moved.call_count > 0
    with ordinary_autograd():
        assert_same(actual, gradients(model, model(input_ids=ids).logits.sin().sum()))
    with torch.no_grad():
        assert isinstance(model(input_ids=ids).past_key_values, PTECache)


def test_adapters_changed_before_the_backward_pass_are_noticed() -> None:
    model = with_adapter(tiny_model("llama"), window_size=6, gradient="truncated").train()
    loss = model(input_ids=torch.randint(3, 61, (1, 20)), prompt_lengths=5).logits.sum()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="call `backward` before they are changed"):
        loss.backward()


@settings(max_examples=20)
@given(case=cases(), head=st.booleans(), piece=st.sampled_from([1, 3, 128]))
def test_offload_does_not_change_gradients(case: Case, head: bool, piece: int) -> None:
    """What a recomputed segment reads has come back from host memory."""
    found = []
    for offload in (False, True):
        model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config, offload=offload).train()
        model.gradient_checkpointing_enable()
        ids, mask = right_padded(case)
        with patch("peft_pte.replay.replay.SHORTEST_PIECE", piece):
            value = loss_of(case, model) if not head else sequence_logprobs(model, ids, mask, case.prompts)[0].sum()
        found.append(gradients(model, value))
    assert_same(found[1], found[0])


def test_offload_moves_every_evicted_thought_once() -> None:
    """Keys and values of a token are copied once, however many segments see them."""
    model = with_adapter(tiny_model("llama"), window_size=8, offload=True).train()
    model.gradient_checkpointing_enable()
    moved: list[torch.Tensor] = []
    with patch("peft_pte.replay.segments.host_copy", lambda x: moved.append(x.detach().clone()) or moved[-1]):
        loss = model(input_ids=torch.randint(3, 61, (1, 5 + 8 + 12)), prompt_lengths=5).logits.sum()
        assert sum(x.shape[-2] for x in moved if x.ndim == 4) == 2 * 2 * 12  # two layers; keys and values
        loss.backward()
    assert sum(x.shape[-2] for x in moved if x.ndim == 4) == 2 * 2 * 12
    model.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="`offload` is True, but it moves what gradient checkpointing keeps"):
        model(input_ids=torch.randint(3, 61, (1, 20)), prompt_lengths=5)


@settings(max_examples=10)
@given(case=cases(equal=True))
def test_gradients_through_a_cache_equal_the_replay(case: Case) -> None:
    """A cache that is fed under autograd gives the same gradients as the replay."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    ids, mask = left_padded(case)
    width = max(case.prompts)
    replayed = model(input_ids=ids, attention_mask=mask, prompt_lengths=width).logits
    expected = gradients(model, replayed[mask.bool()].log_softmax(-1).square().mean())
    cached = model(input_ids=ids, attention_mask=mask, prompt_lengths=width, use_cache=True)
    assert isinstance(cached.past_key_values, PTECache)
    assert relative_error(cached.logits[mask.bool()], replayed[mask.bool()]) <= 1e-10
    assert_same(gradients(model, cached.logits[mask.bool()].log_softmax(-1).square().mean()), expected)


def test_borders_are_found_in_the_call() -> None:
    model = with_adapter(tiny_model("llama"), window_size=4)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    labels[0, 9:12] = -100  # later masks (tool results, say) do not move the border
    with torch.no_grad():
        expected = model(input_ids=ids, prompt_lengths=6).logits
        assert torch.equal(model(input_ids=ids, labels=labels).logits, expected)
        # Close and not equal: a matrix product of fewer rows may be summed in another order.
        kept = model(input_ids=ids, logits_to_keep=15).logits
        torch.testing.assert_close(kept, expected[:, -15:], rtol=1e-12, atol=1e-12)
        assert torch.equal(model(input_ids=ids, prompt_lengths=torch.tensor([6, 6])).logits, expected)
        labels[1] = -100  # a row without labels takes the batch's minimum
        assert torch.equal(model(input_ids=ids, labels=labels).logits, expected)
        hidden = model(input_ids=ids, prompt_lengths=6, output_hidden_states=True).hidden_states
        assert [h.shape for h in hidden] == [(2, 20, 32)] * 3
        as_tuple = model(input_ids=ids, prompt_lengths=6, return_dict=False)
        assert torch.equal(as_tuple[0], expected)


def test_loss_on_everything_warns() -> None:
    model = with_adapter(tiny_model("llama"), window_size=4)
    ids = torch.randint(3, 61, (2, 20))
    with pytest.warns(UserWarning, match="keeps no prompt"):
        model(input_ids=ids, labels=ids)


# -------------------------------------------------------------------------------------------------------- the Trainer


class Recall(torch.utils.data.Dataset):
    """Sequences whose second half repeats the first; completion-only labels."""

    def __init__(self, size: int = 64):
        generator = torch.Generator().manual_seed(0)
        first = torch.randint(3, 20, (size, 12), generator=generator)
        self.ids = torch.cat([torch.full((size, 4), 1), first, first], dim=1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[:4] = -100
        return dict(input_ids=self.ids[index], labels=labels)


class FlatTrainer(Trainer):
    """As in docs/training.md."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = sequence_loss(
            model, inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), num_items_in_batch
        )
        return (loss, {}) if return_outputs else loss


def trainer(config, folder: Path, kind: type[Trainer] = Trainer, **options) -> Trainer:
    """A plain script; `config` is the only line in which LoRA and PTE differ."""
    model = get_peft_model(tiny_model("llama", torch.float32), config)
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    return kind(model, TrainingArguments(**(settings | options)), train_dataset=Recall(), eval_dataset=Recall(8))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


PTE = PTEConfig(task_type="CAUSAL_LM", r=8, window_size=6, num_global_tokens=4, pte_dropout=0.1)


def test_trainer_script_differs_from_lora_in_one_line(tmp_path: Path) -> None:
    lora = trainer(LoraConfig(task_type="CAUSAL_LM", r=8), tmp_path / "lora")
    lora.train()
    whole = trainer(PTE, tmp_path / "pte", gradient_checkpointing=True)
    whole.train()
    whole.save_model(str(tmp_path / "adapter"))
    for run in (lora, whole):
        assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("thought_encoder.pte_key" in key for key in file.keys())  # noqa: SIM118 (safe_open is no dict)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PTE"

    # Resumed in the middle: the same losses and the same adapter.
    resumed = trainer(PTE, tmp_path / "pte2", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "pte" / "checkpoint-6"))
    assert losses(resumed)[-6:] == losses(whole)[-6:]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name

    # Evaluation replays the same policy, and the loaded adapter is the trained one.
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path / "adapter")
    batch = {k: torch.stack([Recall(8)[i][k] for i in range(8)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss.item(), whole.evaluate()["eval_loss"], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_does_not_change_training(tmp_path: Path) -> None:
    runs = []
    for flag in (False, True):  # one after the other: both draw their dropout from the global generator
        runs.append(trainer(PTE, tmp_path / str(flag), max_steps=3, gradient_checkpointing=flag))
        runs[-1].train()
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["full", "truncated"])
def test_trainer_with_the_loss_head(tmp_path: Path, gradient: str) -> None:
    """Under gradient accumulation: the losses and the evaluation of the plain Trainer."""
    config = PTEConfig(task_type="CAUSAL_LM", r=8, window_size=6, num_global_tokens=4, gradient=gradient)
    options = dict(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    runs = [trainer(config, tmp_path / kind.__name__, kind, **options) for kind in (Trainer, FlatTrainer)]
    for run in runs:
        run.train()
    assert len(losses(runs[0])) == 4
    torch.testing.assert_close(losses(runs[1]), losses(runs[0]), rtol=1e-4, atol=0)
    evaluations = [run.evaluate()["eval_loss"] for run in runs]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-4)


def test_bf16_autocast_keeps_states_in_float32() -> None:
    model = with_adapter(tiny_model("llama", torch.float32), window_size=6).train()
    ids = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    exact = model(input_ids=ids, prompt_lengths=5).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=ids, prompt_lengths=5, use_cache=True)
    assert output.past_key_values.layers[0].states["default"].dtype == torch.float32
    assert relative_error(output.logits.float(), exact) < 0.2
    output.logits.float().logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

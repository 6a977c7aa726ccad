"""Attention transfer: each layer's attention alone, against decoding token by token from the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed_jobs import Case as Step
from distributed_jobs import build, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, RELATIVES, tiny_model, with_adapter
from test_distillation import columns_of_prompts, counted_tokens
from test_distributed import LONG, SHORT, run
from test_policy import Case, cases, left_padded, right_padded
from test_training import assert_same, gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pte import PTECache, attention_loss, record_attention, window

IDS = torch.randint(3, 61, (2, 25), generator=torch.Generator().manual_seed(0))


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_base_model().model.layers]


def recorded(model: nn.Module, row: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes in and comes out of each layer's attention, each [1, T, D], when the base reads a row [1, T]."""
    found: list[Any] = [None] * len(attentions(model))

    def note(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        found[attention.layer_idx] = kwargs["hidden_states"], output[0]

    handles = [attention.register_forward_hook(note, with_kwargs=True) for attention in attentions(model)]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=row, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def decoded(model: nn.Module, row: torch.Tensor, prompt: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes out of each layer's attention [1, T, D], token by token with a cache, where `inputs` go in."""
    outputs: list[list[torch.Tensor]] = [[] for _ in inputs]

    def swap(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        start = sum(part.shape[1] for part in outputs[attention.layer_idx])  # a prompt may come in several pieces
        columns = slice(start, start + kwargs["hidden_states"].shape[1])
        return args, kwargs | dict(hidden_states=inputs[attention.layer_idx][:, columns])

    def note(attention: nn.Module, args: tuple, output: Any) -> None:
        outputs[attention.layer_idx].append(output[0])

    handles = [a.register_forward_pre_hook(swap, with_kwargs=True, prepend=True) for a in attentions(model)]
    handles += [a.register_forward_hook(note) for a in attentions(model)]
    cache, borders = PTECache(), [0, prompt, *range(prompt + 1, row.shape[1] + 1)]
    for start, end in zip(borders, borders[1:]):
        model(input_ids=row[:, start:end], past_key_values=cache, prompt_lengths=prompt)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts, 1) for parts in outputs]


@settings(max_examples=14)
@given(
    case=cases(),
    left=st.booleans(),
    checkpointing=st.booleans(),
    only_after_eviction=st.sampled_from([True, True, False]),
)
def test_equal_to_decoding_from_the_same_inputs(
    case: Case, left: bool, checkpointing: bool, only_after_eviction: bool
) -> None:
    """The loss and its gradients, in float64, wherever padding is, also with recomputed segments."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config).train()
    ids, mask = left_padded(case) if left else right_padded(case)
    counted = counted_tokens(case, mask, only_after_eviction)
    compared = [
        counted[row, mask[row].bool()].roll(-1) for row in range(len(case.rows))
    ]  # a token counts where the one after it is predicted
    size = case.config["window_size"]
    squares, powers = [], []
    with window(model, window_size=max(case.prompts) if size == "prompt" else size):
        for tokens, prompt, here in zip(case.rows, case.prompts, compared):
            row = torch.tensor([tokens])
            pairs = recorded(model, row)
            found = decoded(model, row, prompt, [given for given, _ in pairs])
            squares.append(torch.stack([(y - t).square().mean(-1)[0, here] for y, (_, t) in zip(found, pairs)]))
            powers.append(torch.stack([t.square().mean(-1)[0, here] for _, t in pairs]))
    scales = torch.cat(powers, 1).mean(1, keepdim=True)
    loss = (torch.cat(squares, 1) / scales).mean() if counted.any() else None
    plain = gradients(model, loss) if loss is not None else {}
    if checkpointing:
        model.gradient_checkpointing_enable()
    actual = attention_loss(model, ids, mask, columns_of_prompts(case, left), only_after_eviction)
    here = gradients(model, actual)
    if loss is None:
        assert actual == 0 and not any(gradient.any() for gradient in here.values())
        return
    torch.testing.assert_close(actual, loss, rtol=1e-10, atol=1e-12)
    # B of q, k and v has no part in anything while A is zero, and so on: what ordinary autograd leaves out is zero.
    for name in here.keys() ^ plain.keys():
        assert not (here.get(name, plain.get(name))).any(), name
    assert_same({name: here[name] for name in plain if name in here}, {n: plain[n] for n in plain if n in here})


@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_nothing_is_lost_while_nothing_has_left(family: str) -> None:
    """A fresh adapter under a window for everything: attention is the base's. Models are left as they were."""
    model = with_adapter(tiny_model(family), init_weights=True, window_size=40)
    loss = attention_loss(model, IDS, prompt_lengths=5, only_after_eviction=False)
    assert loss < 1e-20
    assert not any("forward" in layer.__dict__ for layer in model.get_base_model().model.layers)
    with window(model, window_size=6):
        assert attention_loss(model, IDS, prompt_lengths=5) > 1e-3


@pytest.mark.parametrize("way", ["truncated", "offload"])
def test_truncated_and_offloaded_equal_ordinary_autograd(way: str) -> None:
    found = []
    for ordinary in (True, False):
        options: dict[str, Any] = dict(gradient="truncated" if way == "truncated" else "full")
        options |= dict(offload=way == "offload" and not ordinary, window_size=6)
        model = with_adapter(tiny_model("llama"), **options).train()
        if way == "offload":
            model.gradient_checkpointing_enable()
        with patch("peft_pte.replay.replay.is_sharded", lambda parameters, ordinary=ordinary: ordinary):
            found.append(gradients(model, attention_loss(model, IDS, prompt_lengths=5)))
    assert_same(found[1], found[0])


def test_layers_learn_independently() -> None:
    """What a layer learns does not depend on what others have learned; layers without an adapter take no part."""
    model = with_adapter(tiny_model("llama"), window_size=6).train()
    names = [name for name, _ in model.named_parameters() if "layers.1." in name]
    before = gradients(model, attention_loss(model, IDS, prompt_lengths=5))
    for name, parameter in model.named_parameters():
        if "layers.0." in name and "pte_" in name:
            parameter.data.mul_(2)
    after = gradients(model, attention_loss(model, IDS, prompt_lengths=5))
    kept = [name for name in names if name in before]
    assert kept
    assert_same({name: after[name] for name in kept}, {name: before[name] for name in kept})
    one = with_adapter(tiny_model("llama"), window_size=6, layers_to_transform=[1]).train()
    assert record_attention(one, IDS).shape == (2, 25, 1, 2, 32)
    loss = attention_loss(one, IDS, prompt_lengths=5)
    assert loss > 0 and all("layers.1." in name for name in gradients(one, loss))


def test_a_record_serves_several_steps() -> None:
    """It is that of the base, whatever the adapter has learned; the error of the base under the window is known too."""
    model = with_adapter(tiny_model("llama"), window_size=6).train()
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    record = record_attention(model, IDS, mask)
    options: dict[str, Any] = dict(attention_mask=mask, prompt_lengths=10)
    assert attention_loss(model, IDS, record=record, **options) == attention_loss(model, IDS, **options)
    with torch.no_grad(), model.disable_adapter():
        of_base = attention_loss(model, IDS, record=record, **options)
        assert of_base == attention_loss(model, IDS, **options) > 0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = attention_loss(model, IDS, record=record, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(record_attention(model, IDS, mask), record)
    assert losses[-1] < of_base * 0.8 and losses[-1] < losses[0]


class Copies(TorchDispatchMode):
    """Counts what is written to memory of its own and has at least `size` numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.storages = size, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.size * result.element_size():
            self.storages.add(result.untyped_storage().data_ptr())
        return result


def test_a_record_is_never_held_twice() -> None:
    """It is larger than anything else: neither modules' parts nor tokens in another order are copied all at once."""
    model = with_adapter(tiny_model("llama", num_hidden_layers=12), window_size=6)
    ids, mask = IDS.repeat(1, 4), torch.ones(2, 100, dtype=torch.long)
    mask[0, :7] = 0
    with Copies(record_attention(model, ids, mask).numel()) as copies:
        record_attention(model, ids, mask)
    assert len(copies.storages) == 1


def test_bad_input() -> None:
    model, base = with_adapter(tiny_model("llama"), window_size=6), tiny_model("llama")
    record = record_attention(model, IDS)
    wrong: list[tuple[nn.Module, dict[str, Any], str]] = [
        (base, {}, r"`model` \(LlamaForCausalLM\) has no PTE adapter"),
        (model, dict(prompt_lengths=None), "`prompt_lengths` is None, but with `retained_prefix='prompt'`"),
        (
            model,
            dict(record=record[:, :24]),
            r"`record` has shape \(2, 24, 2, 2, 32\), but must be \[2, 25, 2, 2, 'h",
        ),
        (model, dict(record=record[0]), r"`record` has shape \(25, 2, 2, 32\)"),
    ]
    for of, changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            attention_loss(of, **(dict(input_ids=IDS, prompt_lengths=5) | changes))
    sharded = patch("peft_pte.replay.transfer.is_sharded_tensor", return_value=True)
    with sharded, pytest.raises(ValueError, match="parameters are sharded"):
        attention_loss(model, IDS, prompt_lengths=5)


def test_two_processes_have_the_gradients_of_their_rows(tmp_path: Path) -> None:
    """Under DDP, whatever the ranks' numbers of segments: each rank's errors are by its own rows' mean squares."""
    step = Step([[LONG], [SHORT]], "attention", False, dict(gradient="truncated"))
    model = build(step)
    loss = sum(loss_of(model, rows, step) for of_rank in step.rows for rows in of_rank)
    whole = gradients(model, loss)
    (ranks,) = run("ddp", [step], tmp_path)
    for found in ranks:
        assert abs(found.pop("loss") - loss) <= 1e-10 * loss
        for name in found.keys() - whole.keys():
            assert not found.pop(name).any()
        assert_same(found, whole)

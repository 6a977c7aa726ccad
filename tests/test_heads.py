"""`sequence_logprobs`: the policy's log-probabilities, without logits of a whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, RELATIVES, tiny_model, with_adapter
from test_policy import Case, cases, left_padded, right_padded
from test_training import assert_same, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pte import distillation_loss, sequence_logprobs, sequence_loss
from peft_pte.replay import heads


def expected_of(logits: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor, temperature: float) -> tuple:
    """From full logits: per-token log-probabilities and entropies, zero where not wanted."""
    distribution = (logits / temperature).log_softmax(-1)[:, :-1]
    logprobs = distribution.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    return tuple(torch.nn.functional.pad(x, (1, 0)).masked_fill(~wanted, 0) for x in (logprobs, entropy))


@settings(max_examples=40)
@given(
    case=cases(),
    left=st.booleans(),
    checkpointing=st.booleans(),
    chunk=st.sampled_from([1, 7, 1000]),
    temperature=st.sampled_from([0.7, 1.0]),
)
def test_equal_to_logits_forward_and_backward(
    case: Case, left: bool, checkpointing: bool, chunk: int, temperature: float
) -> None:
    """In the caller's layout, zero on prompt and padding; gradients of all parameters are the same."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config).train()
    ids, mask = left_padded(case) if left else right_padded(case)
    borders = torch.tensor([max(case.prompts)] * len(case.rows) if left else case.prompts)
    wanted = mask.bool() & (torch.arange(ids.shape[1]) >= borders[:, None])
    wanted[:, 0] = False
    logits = model(input_ids=ids, attention_mask=mask, prompt_lengths=borders).logits
    expected = expected_of(logits, ids, wanted, temperature)
    weights = torch.linspace(0.5, 1.5, ids.shape[1], dtype=torch.float64)
    plain = gradients(model, (expected[0] * weights).sum())
    if checkpointing:
        model.gradient_checkpointing_enable()
    with patch("peft_pte.replay.chunks.CHUNK_TOKENS", chunk):
        logprobs, entropy = sequence_logprobs(model, ids, mask, borders, temperature)
        assert logprobs.dtype == torch.float64 and not entropy.requires_grad
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(entropy, expected[1], rtol=1e-9, atol=1e-9)
        assert_same(gradients(model, (logprobs * weights).sum()), plain)


@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_families_that_scale_their_logits(family: str) -> None:
    """Granite and Cohere scale logits: the model's own head is used."""
    model = with_adapter(tiny_model(family, torch.float32), window_size=6)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_lengths=5).logits
        wanted = (torch.arange(20) >= 5).expand(2, -1)
        expected = expected_of(logits, ids, wanted, 1.0)
        for actual, target in zip(sequence_logprobs(model, ids, prompt_lengths=5), expected):
            torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-4)


def test_with_the_adapter_off_it_is_the_base_model_with_its_full_cache() -> None:
    base = tiny_model("qwen2")
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = base(input_ids=ids).logits
    model = with_adapter(base, window_size=4)
    wanted = (torch.arange(20) >= 5).expand(2, -1)
    with torch.no_grad(), model.disable_adapter():
        logprobs, entropy = sequence_logprobs(model, ids, prompt_lengths=5)
    expected = expected_of(logits, ids, wanted, 1.0)
    torch.testing.assert_close(logprobs, expected[0])
    torch.testing.assert_close(entropy, expected[1])


@settings(max_examples=20)
@given(case=cases(), gradient=st.sampled_from(["full", "truncated"]), items=st.sampled_from([None, 37]))
def test_loss_equals_that_of_a_forward_with_labels(case: Case, gradient: str, items: int | None) -> None:
    """Label shift, `num_items_in_batch`, masks inside a completion, and gradients."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config, gradient=gradient).train()
    ids, mask = right_padded(case)
    columns = torch.arange(ids.shape[1])
    labels = ids.masked_fill((mask == 0) | (columns < torch.tensor(case.prompts)[:, None]), -100)
    labels[0, case.prompts[0] + 1 : case.prompts[0] + 3] = -100
    if not bool((labels[:, 1:] != -100).any()):
        return
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
    actual = sequence_loss(model, ids, labels, mask, items)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-8)  # transformers: float32
    expected, actual = gradients(model, expected), gradients(model, actual)
    scale = max(g.abs().max() for g in expected.values())
    assert all((actual[name] - g).abs().max() <= 1e-5 * scale for name, g in expected.items())


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_logits_of_a_whole_sequence() -> None:
    """Neither forward nor backward makes a [T, vocab] tensor."""
    length, vocab = 800, 4001
    model = with_adapter(tiny_model("llama", torch.float32, vocab_size=vocab), window_size=64).train()
    ids = torch.randint(3, vocab, (1, length))
    with patch("peft_pte.replay.chunks.CHUNK_TOKENS", 100), LargestTensor() as largest:
        sequence_logprobs(model, ids, prompt_lengths=5)[0].sum().backward()
    assert 0 < largest.numel <= 100 * vocab < length * vocab / 4


class BatchedProducts(TorchDispatchMode):
    """Records the last dimension of batched products: one product for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.widths.add(out.shape[-1])
        return out


@pytest.mark.parametrize("gradient", ["full", "truncated"])
@pytest.mark.parametrize("function", [sequence_logprobs, distillation_loss])
def test_the_head_is_one_product_for_all_rows(function: Callable[..., Any], gradient: str) -> None:
    """One for each row copies the head's weight, in bfloat16 on a CPU, as often."""
    vocab = 401
    model = with_adapter(tiny_model("llama", torch.float32, vocab_size=vocab), window_size=8, gradient=gradient).train()
    ids = torch.randint(3, vocab, (3, 40))
    with patch("peft_pte.replay.chunks.CHUNK_TOKENS", 15), BatchedProducts() as seen:
        found = function(model, ids, prompt_lengths=5)
        (found if function is distillation_loss else found[0].sum()).backward()
    assert seen.widths and vocab not in seen.widths


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("gradient, checkpointing", [("full", False), ("full", True), ("truncated", False)])
def test_logits_are_made_once_unless_the_head_is_trained(gradient: str, checkpointing: bool, trained: bool) -> None:
    """Gradients of a frozen head's hidden states are taken in the forward, those of a trained one by recomputing."""
    model = with_adapter(tiny_model("llama"), window_size=8, gradient=gradient).train()
    model.get_output_embeddings().weight.requires_grad_(trained)
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, prompt_lengths=5).logits
    wanted = (torch.arange(40) >= 5).expand(2, -1)
    expected = gradients(model, expected_of(logits, ids, wanted, 1.0)[0].sum())
    if checkpointing:
        model.gradient_checkpointing_enable()
    with (
        patch("peft_pte.replay.chunks.CHUNK_TOKENS", 6),
        patch("peft_pte.replay.heads.logits_of", wraps=heads.logits_of) as made,
    ):
        logprobs, _ = sequence_logprobs(model, ids, prompt_lengths=5)
        once = made.call_count
        assert_same(gradients(model, logprobs.sum()), expected)
    is_recomputed = checkpointing or gradient == "truncated"  # the segment, and its logits with it
    assert made.call_count == once * (1 + is_recomputed + trained) and once > 5
    with patch("peft_pte.replay.chunks.WithGradients.apply") as taken, torch.no_grad():
        sequence_logprobs(model, ids, prompt_lengths=5)
    assert not taken.called


def test_bad_input() -> None:
    ids = torch.randint(3, 61, (1, 20))
    with pytest.raises(ValueError, match="`temperature` is 0, but must be a positive number"):
        sequence_logprobs(with_adapter(tiny_model("llama")), ids, temperature=0)
    with pytest.raises(ValueError, match=r"`model` \(LlamaForCausalLM\) has no PTE adapter"):
        sequence_logprobs(tiny_model("llama"), ids)
    with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
        sequence_logprobs(with_adapter(tiny_model("llama"), window_size=6), ids)
    with pytest.raises(ValueError, match="`labels` hold other tokens than `input_ids`"):
        sequence_loss(with_adapter(tiny_model("llama")), ids, (ids + 1) % 61)
    with pytest.raises(ValueError, match="differ in shape"):
        sequence_loss(with_adapter(tiny_model("llama")), ids, ids[:, 1:])
    logprobs, _ = sequence_logprobs(with_adapter(tiny_model("llama"), window_size=40), ids)  # fits: no border needed
    assert bool((logprobs[:, 1:] < 0).all())

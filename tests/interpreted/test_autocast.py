"""Training under autocast with the kernels: what they declare is what they give, and truncated gradients are exact."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import tiny_model, with_adapter
from numerics import relative_error

import peft_pte_kernels
from peft_pte import sequence_logprobs

PROMPT = 7
# With a window of 8 and 4 evicted at once, segments begin at columns 15 and 19: the last has one token, or three.
LENGTHS = (20, 22)


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def adapted(**config: Any) -> torch.nn.Module:
    settings = dict(window_size=8, eviction_ratio=0.5, pte_alpha=1) | config
    return with_adapter(tiny_model("llama", torch.float32, num_hidden_layers=1), **settings).train()


def gradients(model: torch.nn.Module, length: int, head: bool = False, inside: bool = False) -> dict[str, torch.Tensor]:
    """Of all adapters, with the forward pass under autocast, and the backward pass too if `inside`."""
    model.zero_grad()
    ids = torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(0))
    with autocast():
        if head:
            loss = -sequence_logprobs(model, ids, prompt_lengths=PROMPT)[0].mean()
        else:
            loss = model(input_ids=ids, prompt_lengths=PROMPT).logits[:, PROMPT:].float().square().mean()
    with autocast(inside):
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize(
    "length, inside, head", [*((length, False, False) for length in LENGTHS), (20, True, False), (20, False, True)]
)
def test_truncated_gradients_are_those_of_ordinary_autograd(length: int, inside: bool, head: bool) -> None:
    """Float32 adapters have float32 gradients: nothing is rounded to bfloat16 that ordinary autograd does not round."""
    model = adapted(gradient="truncated")
    with patch("peft_pte.replay.replay.is_sharded", lambda parameters: True):
        expected = gradients(model, length, head)
    actual = gradients(model, length, head, inside)
    assert actual.keys() == expected.keys() and len(expected) > 8
    for name, x in expected.items():
        assert x.dtype == torch.float32
        assert relative_error(actual[name], x.double()) <= 1e-6, name


@pytest.mark.parametrize("length", LENGTHS)
def test_full_gradients(length: int) -> None:
    """As without kernels, but for the rounding of bfloat16."""
    model = adapted()
    actual = gradients(model, length)
    with patch.object(peft_pte_kernels.dispatch, "MODE", "torch"):
        expected = gradients(model, length)
    actual, expected = (torch.cat([x.flatten() for x in found.values()]) for found in (actual, expected))
    assert relative_error(actual, expected.double()) < 5e-2


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_does_not_depend_on_autocast(dtype: torch.dtype, num_tokens: int) -> None:
    """Bit for bit, forward and backward: the op multiplies in the dtypes that it chooses."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_tokens, 24), (2, num_tokens, 16), (2, 8, 8), (16, 8), (8, 24), (8, 24)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[:2] = [x.to(dtype) for x in inputs[:2]]

    def run() -> list[torch.Tensor]:
        x, base, state, a, b, gate = leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        (output,) = peft_pte_kernels.low_rank_update(x, [base], state, [a], [b], 0.5, gate)
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    expected = run()
    with autocast():
        actual = run()
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)

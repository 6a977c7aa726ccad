"""The state-conditioned low-rank update in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import LIMITS, compare

import peft_pte_kernels
from peft_pte_kernels import reference
from peft_pte_kernels.ops import low_rank


@st.composite
def updates(draw: st.DrawFn) -> dict[str, Any]:
    """Decoding (one token) and segments, one to three projections of different widths, mixed dtypes and strides.

    A single one with a gate or without.
    """
    dtype = draw(st.sampled_from(list(LIMITS)))
    num_rows = draw(st.integers(1, 6))
    widths = draw(st.lists(st.sampled_from([8, 33, 64, 130, 144]), min_size=1, max_size=3))
    gated = len(widths) == 1 and draw(st.booleans())
    width, r = draw(st.sampled_from([24, 70, 128, 520])), draw(st.sampled_from([4, 5, 8, 16, 32, 40]))
    num_tokens = draw(st.sampled_from([1, 1, 2, 17, 40]))
    if num_tokens > 1 and dtype != torch.float32:
        # Half-precision operands: their rounding averages out over tokens and features, of which a few do not suffice.
        num_tokens, width, widths = max(17, num_tokens), max(70, width), [max(33, out) for out in widths]
    weight_dtype = draw(st.sampled_from([torch.float32, dtype]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = (
        random(num_tokens, num_rows, width).transpose(0, 1)
        if draw(st.booleans())
        else random(num_rows, num_tokens, width)
    )
    return dict(
        tensors=[x.to(dtype), random(num_rows, r, r).float() / r**0.5]
        + [random(num_rows, num_tokens, out).to(dtype) for out in widths]
        + [(random(out, r) / r**0.5).to(weight_dtype) for out in widths]
        + [(random(r, width) / width**0.5).to(weight_dtype) for _ in range(len(widths) + gated)],
        scaling=draw(st.sampled_from([1.0, 0.25, 2.0])),
        target_programs=draw(st.sampled_from([1, low_rank.TARGET_PROGRAMS])),  # several rows a program, or one
        limit=LIMITS[dtype],
    )


def unpacked(function: Any, scaling: float) -> Any:
    def call(x: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        size = len(rest) // 3
        bases, A, B = (list(rest[i * size : (i + 1) * size]) for i in range(3))
        return function(x, bases, state, A, B, scaling, *rest[3 * size :])

    return call


@settings(max_examples=70)
@given(updates())
def test_low_rank_update(case: dict[str, Any]) -> None:
    with patch.object(low_rank, "TARGET_PROGRAMS", case["target_programs"]):
        compare(
            unpacked(peft_pte_kernels.low_rank_update, case["scaling"]),
            unpacked(reference.low_rank_update, case["scaling"]),
            case["tensors"],
            case["limit"],
        )


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_frozen_weights_and_inputs_get_no_gradient(num_tokens: int) -> None:
    """Whatever needs a gradient gets it, and nothing else is computed for."""
    x, state, base = torch.randn(2, num_tokens, 24), torch.randn(2, 8, 8), torch.randn(2, num_tokens, 16)
    A, B, G = torch.randn(16, 8), torch.randn(8, 24), torch.randn(8, 24)
    for name in ("x", "state", "base", "A", "B", "G"):
        tensors = dict(x=x, state=state, base=base, A=A, B=B, G=G)
        tensors[name] = tensors[name].clone().requires_grad_()

        def output(function: Any, tensors: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            x, state, base, a, b, gate = tensors.values()
            return function(x, [base], state, [a], [b], 0.5, gate)[0]

        actual = torch.autograd.grad(output(peft_pte_kernels.low_rank_update).sum(), tensors[name])
        expected = torch.autograd.grad(output(reference.low_rank_update).sum(), tensors[name])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_outputs_that_are_not_used(num_tokens: int) -> None:
    """They have no gradient, and the others are as if they were not there."""
    x, state = torch.randn(2, num_tokens, 24, requires_grad=True), torch.randn(2, 8, 8)
    bases, A, B = ([torch.randn(shape) for _ in range(2)] for shape in ((2, num_tokens, 16), (16, 8), (8, 24)))
    both = peft_pte_kernels.low_rank_update(x, bases, state, A, B, 0.5)
    (one,) = peft_pte_kernels.low_rank_update(x, bases[1:], state, A[1:], B[1:], 0.5)
    actual, expected = (torch.autograd.grad(output.sum(), x)[0] for output in (both[1], one))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("num_projections, gated", [(1, False), (1, True), (3, False)])
def test_ops_are_registered_properly(num_tokens: int, num_projections: int, gated: bool) -> None:
    x, state = torch.randn(2, num_tokens, 24, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    bases, A, B = (
        [torch.randn(shape, requires_grad=True) for _ in range(num_projections)]
        for shape in ((2, num_tokens, 16), (16, 8), (8, 24))
    )
    B += B[:gated]
    torch.library.opcheck(low_rank.low_rank_op, (x, bases, state, A, B, 0.5))
    x, state = x.detach(), state.detach()
    bases, A, B = ([tensor.detach() for tensor in column] for column in (bases, A, B))
    z = torch.randn(1, len(B), 2, 8) if num_tokens == 1 else torch.randn(2 * num_tokens, len(B) * 8)
    for needs_input in (True, False):
        torch.library.opcheck(low_rank.low_rank_backward_op, (bases, x, z, state, A, B, 0.5, needs_input))

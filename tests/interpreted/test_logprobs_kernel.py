"""The kernels of log-probabilities and entropy against the reference in float64."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, with_adapter
from numerics import LIMITS, poisoned, relative_error

import peft_pte_kernels
from peft_pte import sequence_logprobs
from peft_pte_kernels import reference
from peft_pte_kernels.ops import logprobs
from peft_pte_kernels.ops.logprobs import BLOCK, logprobs_op

SHAPES = st.sampled_from([(1,), (), (5,), (2, 3), (3, 1, 2)])
VOCABULARIES = st.one_of(
    st.integers(1, 300), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17, 3 * BLOCK, 151936 // 16])
)


def strided(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout."""
    if layout == "rows apart":
        wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 7), float("nan"), dtype=logits.dtype)
        wide[..., 3 : 3 + logits.shape[-1]] = logits
        return wide[..., 3 : 3 + logits.shape[-1]]
    if layout == "part of a batch" and logits.dim() > 1:
        longer = torch.cat([logits, torch.full_like(logits[..., :1, :], float("nan"))], dim=-2)
        return longer[..., :-1, :]
    if layout == "rows exchanged" and logits.dim() > 2:
        return logits.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "columns":
        return logits.mT.contiguous().mT if logits.dim() > 1 else logits.repeat_interleave(2)[::2]
    return logits


def compare(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
    """Both results and the gradient, with memory poisoned."""
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    exact = logits.detach().double().requires_grad_()
    expected, entropy = reference.token_logprobs(exact, targets, temperature)
    (expected * weights).sum().backward()
    logits = logits.detach().requires_grad_()
    with poisoned():
        actual, actual_entropy, _ = logprobs_op(logits, targets, temperature)
        (actual * weights).sum().backward()
    assert actual.dtype == actual_entropy.dtype == torch.float32
    assert not actual_entropy.requires_grad
    assert logits.grad.dtype == logits.dtype
    assert relative_error(actual, expected) < LIMITS[torch.float32]
    assert relative_error(actual_entropy, entropy) < LIMITS[torch.float32]
    assert relative_error(logits.grad, exact.grad) < LIMITS[logits.dtype]


@settings(max_examples=100)
@given(
    shape=SHAPES,
    vocabulary=VOCABULARIES,
    dtype=st.sampled_from(list(LIMITS)),
    layout=st.sampled_from(["plain", "rows apart", "part of a batch", "rows exchanged", "columns"]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    spread=st.sampled_from([0.1, 3.0]),
    offset=st.sampled_from([0.0, -5.0]),
    padding=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_against_the_reference(
    shape: tuple[int, ...],
    vocabulary: int,
    dtype: torch.dtype,
    layout: str,
    temperature: float,
    spread: float,
    offset: float,
    padding: int,
    seed: int,
) -> None:
    """Any shape, layout and dtype; the last `padding` entries of the vocabulary may be -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocabulary, generator=generator) * spread + offset).to(dtype)
    valid = max(1, vocabulary - padding)
    logits[..., valid:] = float("-inf")
    targets = torch.randint(valid, shape, generator=generator)
    compare(strided(logits, layout), targets, temperature)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_whole_block_may_be_masked(where: str) -> None:
    logits = torch.randn(2, 3 * BLOCK)
    masked = slice(0, BLOCK + 5) if where == "first" else slice(-BLOCK - 5, None)
    logits[:, masked] = float("-inf")
    compare(logits, torch.tensor([BLOCK + 9, 2 * BLOCK - 9]), 1.0)


def test_logits_far_from_zero() -> None:
    """Entropy and gradient do not depend on an offset; only the log-probability rounds with it."""
    logits = torch.randn(3, 500)
    targets = torch.tensor([0, 7, 499])
    moved = (logits.double() + 2.0**10).float()
    logprob, entropy, _ = logprobs_op(moved, targets, 1.0)
    expected = reference.token_logprobs(moved.double(), targets, 1.0)
    assert relative_error(entropy, expected[1]) < LIMITS[torch.float32]
    assert (logprob - expected[0]).abs().max() < 2.0**10 * torch.finfo(torch.float32).eps


def test_certain_and_uniform() -> None:
    logits = torch.full((2, 1000), -1e4)
    logits[0, 3] = 1e4
    logprob, entropy, normalizer = logprobs_op(logits, torch.tensor([3, 3]), 1.0)
    assert logprob[0] == entropy[0] == 0.0
    assert entropy[1].item() == pytest.approx(math.log(1000), rel=1e-6)
    assert normalizer[0] == 1e4


def test_impossible_token_and_unknown_target() -> None:
    """A token of probability zero has -inf; a target outside the vocabulary reads nothing and is NaN."""
    logits = torch.tensor([[0.0, float("-inf")], [0.0, 1.0], [0.0, 1.0]])
    logprob, entropy, _ = logprobs_op(logits, torch.tensor([1, 2, -100]), 1.0)
    assert logprob[0] == float("-inf") and entropy[0] == 0.0
    assert logprob[1:].isnan().all()


def test_no_rows() -> None:
    logits = torch.randn(2, 0, 7, requires_grad=True)
    logprob, entropy, _ = logprobs_op(logits, torch.zeros(2, 0, dtype=torch.int64), 1.0)
    assert logprob.shape == entropy.shape == (2, 0)
    logprob.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_registration(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 37).to(dtype).requires_grad_()
    targets = torch.randint(37, (2, 3))
    torch.library.opcheck(logprobs_op, (logits, targets, 0.7))
    grad, normalizer = torch.randn(2, 3), torch.zeros(2, 3)
    torch.library.opcheck(logprobs.logprobs_backward_op, (grad, logits.detach(), targets, normalizer, 0.7))


def test_one_graph() -> None:
    """The op is one node to `torch.compile`, forward and backward."""
    logits = torch.randn(4, 50, requires_grad=True)
    targets = torch.randint(50, (4,))
    compiled = torch.compile(lambda x: logprobs_op(x * 2, targets, 1.0)[0].sum(), backend="aot_eager", fullgraph=True)
    compiled(logits).backward()
    expected = logits.detach().clone().requires_grad_()
    reference.token_logprobs(expected * 2, targets, 1.0)[0].sum().backward()
    assert relative_error(logits.grad, expected.grad.double()) < LIMITS[torch.float32]


def test_sequence_logprobs_use_it() -> None:
    """The policy's log-probabilities and all gradients, with the kernels and without."""
    model = with_adapter(tiny_model("llama", torch.float32)).train()
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        results = sequence_logprobs(model, ids, prompt_lengths=5, temperature=0.7)
        results[0].mean().backward()
        return [*(x.detach() for x in results), *(p.grad for p in model.parameters() if p.grad is not None)]

    with patch.object(logprobs, "launch", wraps=logprobs.launch) as launch:
        actual = run()
    assert launch.call_count >= 2
    with patch.object(peft_pte_kernels, "token_logprobs", reference.token_logprobs):
        expected = run()
    assert len(actual) == len(expected) > 2
    assert all(relative_error(x, y.double()) < 1e-5 for x, y in zip(actual, expected))

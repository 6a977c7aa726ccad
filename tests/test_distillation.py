"""`distillation_loss` and `sequence_divergence`: the base with its full cache teaches the bounded policy."""

from __future__ import annotations

from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from distributed_jobs import Case as Step
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import LiveBytes
from models import RELATIVES, decode, tiny_model, with_adapter
from test_distributed import LONG, ONE_EVICTS, SHORT, expected, run
from test_heads import LargestTensor
from test_policy import Case, cases, left_padded, right_padded
from test_training import assert_same, gradients
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from peft_pte import PTECache, distillation_loss, sequence_divergence, window
from peft_pte.cache.schedule import Schedule
from peft_pte.replay.distillation import Divergence, ForwardKL, kl_divergence, teacher_states
from peft_pte.replay.segments import current_watch, watched

IDS = torch.randint(3, 61, (2, 25), generator=torch.Generator().manual_seed(0))
DIVERGENCES = get_args(Divergence)


def divergences_of(teacher: torch.Tensor, student: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """From full logits [B, T, vocab]: at each token that of the distributions that predict it, [B, T]."""
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher.detach(), student))
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    value = {"forward": forward, "reverse": reverse, "mixed": 0.5 * forward + 0.5 * reverse}[kind]
    return torch.nn.functional.pad(value[:, :-1], (1, 0))


def base_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def counted_tokens(case: Case, mask: torch.Tensor, only_after_eviction: bool) -> torch.Tensor:
    """Which tokens count, row by row: completions, as far as the token before them is stored after an eviction."""
    kept, size = case.config["retained_prefix"], case.config["window_size"]
    size = max(case.prompts) if size == "prompt" else size
    counted = torch.zeros_like(mask).bool()
    for row, prompt in enumerate(case.prompts):
        columns = mask[row].nonzero()[:, 0].tolist()
        full = (prompt if kept == "prompt" else kept) + size  # tokens that are stored when the first ones leave
        for rank, column in enumerate(columns):
            counted[row, column] = rank >= max(1, prompt) and (rank - 1 >= full or not only_after_eviction)
    return counted


def columns_of_prompts(case: Case, left: bool) -> torch.Tensor:
    return torch.tensor([max(case.prompts)] * len(case.rows) if left else case.prompts)


@settings(max_examples=14)
@given(
    case=cases(),
    left=st.booleans(),
    checkpointing=st.booleans(),
    chunk=st.sampled_from([1, 7, 1000]),
    kind=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    only_after_eviction=st.sampled_from([True, True, False]),
)
def test_equal_to_full_logits(
    case: Case,
    left: bool,
    checkpointing: bool,
    chunk: int,
    kind: Divergence,
    temperature: float,
    only_after_eviction: bool,
) -> None:
    """Values, loss and gradients are those of plain autograd on both sides' full logits."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config).train()
    ids, mask = left_padded(case) if left else right_padded(case)
    borders, options = columns_of_prompts(case, left), (kind, temperature, only_after_eviction)
    teacher = base_logits(model, ids, mask)
    student = model(input_ids=ids, attention_mask=mask, prompt_lengths=borders).logits
    counted = counted_tokens(case, mask, only_after_eviction)
    values = divergences_of(teacher, student, kind, temperature).masked_fill(~counted, 0)
    loss = values.sum() / max(1, int(counted.sum()))
    plain = gradients(model, loss)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with patch("peft_pte.replay.chunks.CHUNK_TOKENS", chunk):
        found = sequence_divergence(model, ids, mask, borders, *options)
        assert torch.equal(found.counted, counted)
        torch.testing.assert_close(found.values, values, rtol=1e-10, atol=1e-10)
        forward = divergences_of(teacher, student, "forward", temperature).masked_fill(~counted, 0)
        torch.testing.assert_close(found.kl, forward.detach(), rtol=1e-10, atol=1e-10)
        actual = distillation_loss(model, ids, mask, borders, *options)
        torch.testing.assert_close(actual, loss, rtol=1e-10, atol=1e-12)
        actual = gradients(model, actual)
    if counted.any():
        assert_same(actual, plain)
    else:
        assert not any(gradient.any() for gradient in actual.values())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_truncated_gradients_equal_detaching_by_hand(kind: Divergence) -> None:
    """Cached keys and values are constants at evictions; the chain of states is not."""
    model = with_adapter(tiny_model("llama"), window_size=6, eviction_ratio=0.5, gradient="truncated").train()
    loss = distillation_loss(model, IDS, prompt_lengths=5, divergence=kind, only_after_eviction=False)
    truncated = gradients(model, loss)
    cache, logits, start = PTECache(), [], 0
    for size in [5, 6] + [3] * 4 + [2]:
        logits.append(model(input_ids=IDS[:, start : start + size], past_key_values=cache).logits)
        start += size
        if size != 5:  # the prompt and the first window are one segment
            for layer in cache.layers:
                layer.key_slots.data = layer.key_slots.data.detach()
                layer.value_slots.data = layer.value_slots.data.detach()
    teacher = base_logits(model, IDS, torch.ones_like(IDS))
    by_hand = divergences_of(teacher, torch.cat(logits, dim=1), kind, 1.0)[:, 5:].mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=0)
    assert_same(gradients(model, by_hand), truncated)


@settings(max_examples=6)
@given(case=cases(), left=st.booleans(), way=st.sampled_from(["truncated", "offload"]), size=st.integers(1, 6))
def test_truncated_and_offloaded_equal_ordinary_autograd(case: Case, left: bool, way: str, size: int) -> None:
    """With dropout; the teacher waits in host memory. Under a window of its own, left before the backward pass."""
    gradient = "truncated" if way == "truncated" else "full"
    found = []
    for ordinary in (True, False):
        options = dict(gradient=gradient, offload=way == "offload" and not ordinary, pte_dropout=0.2)
        by_autograd = patch("peft_pte.replay.replay.is_sharded", lambda parameters, ordinary=ordinary: ordinary)
        model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config, **options).train()
        if way == "offload":
            model.gradient_checkpointing_enable()
        ids, mask = left_padded(case) if left else right_padded(case)
        torch.manual_seed(0)
        with (
            by_autograd,
            patch("peft_pte.replay.chunks.CHUNK_TOKENS", 7),
            patch("peft_pte.replay.replay.SHORTEST_PIECE", 3),
        ):
            with window(model, size):
                loss = distillation_loss(model, ids, mask, columns_of_prompts(case, left))
            found.append(gradients(model, loss))
    for name in found[1].keys() - found[0].keys():
        assert not found[1].pop(name).any()
    assert_same(found[1], found[0])


@pytest.mark.parametrize("family", ["phi3", "olmo2", *RELATIVES])
def test_families_that_scale_their_logits(family: str) -> None:
    """Granite and Cohere do: both sides use the model's own head."""
    model = with_adapter(tiny_model(family, torch.float32), window_size=6)
    with torch.no_grad():
        student = model(input_ids=IDS, prompt_lengths=5).logits
        expected = divergences_of(base_logits(model, IDS, torch.ones_like(IDS)), student, "mixed", 1.5)
        found = sequence_divergence(model, IDS, None, 5, "mixed", 1.5)
    assert int(found.counted.sum()) == 2 * (25 - 5 - 6 - 1)
    torch.testing.assert_close(found.values, expected.masked_fill(~found.counted, 0), rtol=1e-3, atol=1e-4)


def test_with_the_adapter_off_the_base_has_the_window() -> None:
    """What an adapter without any effect (A = 0) has, also under `window` and with a streaming prompt; the adapter
    comes back as it was."""
    for changes in (dict(), dict(window_size=3), dict(retained_prefix=2)):
        model = with_adapter(tiny_model("llama"), window_size=6)
        silent = with_adapter(tiny_model("llama"), init_weights=True, **(dict(window_size=6) | changes))
        with torch.no_grad():
            expected = sequence_divergence(silent, IDS, prompt_lengths=5)
            own = sequence_divergence(model, IDS, prompt_lengths=5)
            teacher = teacher_states(model, IDS)
            with model.disable_adapter(), window(model, **(dict(window_size=6) | changes)):
                found = sequence_divergence(model, IDS, prompt_lengths=5, teacher=teacher)
            torch.testing.assert_close(found.kl, expected.kl, rtol=1e-10, atol=1e-12)
            assert torch.equal(found.counted, expected.counted) and bool(found.kl.any())
            assert torch.equal(sequence_divergence(model, IDS, prompt_lengths=5).kl, own.kl)


def test_adapters_are_switched_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error; what was frozen stays frozen, and what was off stays off."""
    model = with_adapter(tiny_model("llama"), window_size=6, modules_to_save=["norm"]).train()
    frozen = [p for name, p in model.named_parameters() if "layers.0" in name or "norm" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    distillation_loss(model, IDS, prompt_lengths=5).backward()
    with pytest.raises(IndexError):
        distillation_loss(model, IDS + 1000, prompt_lengths=5)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters"))
    with model.disable_adapter(), torch.no_grad():
        sequence_divergence(model, IDS, prompt_lengths=5)
        assert all(module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters"))


@settings(max_examples=50)
@given(size=st.integers(1, 9), ratio=st.sampled_from([0.1, 0.34, 0.5, 1.0]), length=st.integers(0, 40))
def test_evictions_are_counted(size: int, ratio: float, length: int) -> None:
    schedule = Schedule.create(size, ratio)
    expected = sum(segment.evict for segment in schedule.segments(0, length))
    assert schedule.num_evictions(length) == expected


@pytest.mark.parametrize("sharded", [False, True])
def test_states_and_evictions_are_watched(sharded: bool) -> None:
    """They are those of decoding, by row, whether layers encode together or each on its own."""
    model = with_adapter(tiny_model("llama"), window_size=6, eviction_ratio=0.5).train()
    model.gradient_checkpointing_enable()
    gathered = "peft_pte.replay.replay.has_gathered_encoders"
    with patch(gathered, lambda decoder: sharded), watched() as watch:
        loss = distillation_loss(model, IDS, prompt_lengths=[5, 14])
    loss.backward()  # what is watched does not disturb a recomputation
    assert current_watch.get() is None
    for row, prompt in enumerate((5, 14)):
        _, cache = decode(model, IDS[row : row + 1], None, [prompt, 25 - prompt])
        assert int(watch.evictions[row]) == cache.num_evicted[0] // 3 > 1
        torch.testing.assert_close(watch.state_norms[:, row], cache.state_norms()["default"][:, 0])


def test_no_logits_of_a_whole_sequence() -> None:
    """Of neither side, neither forward nor backward."""
    length, vocab = 400, 2001
    model = with_adapter(tiny_model("llama", torch.float32, vocab_size=vocab), window_size=64).train()
    ids = torch.randint(3, vocab, (1, length))
    with patch("peft_pte.replay.chunks.CHUNK_TOKENS", 50), LargestTensor() as largest:
        distillation_loss(model, ids, prompt_lengths=5, divergence="mixed", only_after_eviction=False).backward()
    assert 0 < largest.numel <= 50 * vocab < length * vocab / 4


def test_memory_does_not_grow_with_the_sequence() -> None:
    """With truncated gradients: what autograd saves, and the most that is alive in the backward pass. What grows is a
    hidden state of the teacher for each token, in host memory."""
    found = {}
    for length in (192, 768):
        base = tiny_model("llama", torch.float32, vocab_size=997)
        model = with_adapter(base, window_size=64, eviction_ratio=0.5, gradient="truncated").train()
        ids = torch.randint(3, 997, (1, length))
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with LiveBytes() as alive:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = distillation_loss(model, ids, prompt_lengths=5)
            kept, host = alive.live["device"], alive.live["host"]
            alive.peak["device"] = 0
            loss.backward()
        found[length] = sum(saved.values()), alive.peak["device"], kept, host
    (short_saved, short_peak, short_kept, short_host), (saved_bytes, peak, kept, host) = found.values()
    assert short_saved > 10_000 and saved_bytes <= 1.05 * short_saved
    assert short_peak > 500_000 and peak <= 1.05 * short_peak
    assert (kept - short_kept) / 576 <= 16  # bytes a token, of the results and the tokens themselves
    assert (host - short_host) / 576 == 32 * 4


def test_tokens_that_are_impossible() -> None:
    """Padded vocabularies have logits of -inf on both sides."""
    logits = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    p, q = (
        torch.cat([x, torch.full_like(x[..., :2], float("-inf"))], -1).log_softmax(-1) for x in (logits, logits.sin())
    )
    value = kl_divergence(p, q)
    torch.testing.assert_close(value, kl_divergence(p[..., :7], q[..., :7]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("impossible", [0, 2])
def test_forward_kl_is_autograds(impossible: int) -> None:
    """Also where tokens are impossible on both sides; one that is possible for the teacher alone costs infinitely."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    for logits in (teacher, student):
        logits[..., :impossible] = float("-inf")
    expected, weights = teacher.log_softmax(-1), torch.rand(2, 5, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    value, plain = ForwardKL.apply(student, expected), kl_divergence(expected, student.log_softmax(-1))
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-12)
    possible = student[..., impossible:].detach().requires_grad_()
    by_autograd = kl_divergence(expected[..., impossible:], possible.log_softmax(-1))
    (gradient,) = torch.autograd.grad((value * weights).sum(), student)
    (wanted,) = torch.autograd.grad((by_autograd * weights).sum(), possible)
    torch.testing.assert_close(gradient[..., impossible:], wanted, rtol=1e-12, atol=1e-12)
    assert not gradient[..., :impossible].any()
    student = student.detach().index_fill(2, torch.tensor([6]), float("-inf"))
    assert ForwardKL.apply(student, expected).isinf().all()


def test_bad_input() -> None:
    model, base = with_adapter(tiny_model("llama"), window_size=6), tiny_model("llama")
    headed = with_adapter(tiny_model("llama"), window_size=6, modules_to_save=["lm_head"])
    trained = with_adapter(tiny_model("llama"), window_size=6)
    trained.get_base_model().lm_head.requires_grad_(True)
    short = torch.zeros(2, 24, 32, dtype=torch.float64)
    wrong: list[tuple[nn.Module, dict[str, Any], str]] = [
        (model, dict(divergence="jsd"), "`divergence` is 'jsd', but must be one of 'forward', 'reverse', 'mixed'"),
        (model, dict(temperature=0), "`temperature` is 0, but must be a positive number"),
        (base, {}, r"`model` \(LlamaForCausalLM\) has no PTE adapter"),
        (headed, {}, "`model` trains its output head"),
        (trained, {}, "`model` trains its output head"),
        (model, dict(prompt_lengths=None), "`prompt_lengths` is None, but with `retained_prefix='prompt'`"),
        (model, dict(prompt_lengths=[5, 26]), r"`prompt_lengths` must hold one integer in \[0, 25\] for each"),
        (model, dict(teacher=short), r"`teacher` has shape \(2, 24, 32\), but must be \[batch, tokens, hidden size\]"),
    ]
    for of, changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            sequence_divergence(of, **(dict(input_ids=IDS, prompt_lengths=5) | changes))
    streaming = with_adapter(tiny_model("llama"), window_size=6, retained_prefix=2)
    assert int(sequence_divergence(streaming, IDS).counted.sum()) == 2 * (25 - 2 - 6 - 1)  # needs no border


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(strategy: str, tmp_path: Any) -> None:
    """Whatever the ranks' numbers of segments and of compared tokens."""
    steps = [
        Step([[LONG], [SHORT]], "distillation", False, dict(gradient="truncated")),
        Step(ONE_EVICTS, "distillation", True, dict(num_global_tokens=0)),
    ]
    for step, ranks in zip(steps, run(strategy, steps, tmp_path)):
        whole = expected(step)
        scale = max(value.abs().max() for name, value in whole.items() if name != "loss")
        assert scale > 0.001
        for found in ranks:
            assert found.keys() == whole.keys()
            for name, value in whole.items():
                error = (found[name] - value).abs().max()
                assert error <= 1e-10 * (value.abs() if name == "loss" else scale), (name, step)

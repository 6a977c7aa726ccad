"""What must be right before anything is measured: models against themselves, kernels against float64."""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from captured import CapturedSteps
from measuring import Results, plain_torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_pte_kernels
from peft_pte import PTECache, PTEConfig, sequence_logprobs
from peft_pte.cache import graph
from peft_pte_kernels import Rotation, reference

PROMPT, LENGTH = 20, 220


def tiny(device: str, dtype: torch.dtype, **settings: Any) -> torch.nn.Module:
    """A small model with a random adapter that evicts many times in `LENGTH` tokens."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    config = PTEConfig(task_type="CAUSAL_LM", window_size=32, init_weights=False, pte_alpha=1, **settings)
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(device, dtype)


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths, and thoughts."""
    ids = torch.randint(3, 512, (4, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7, 12)):
        mask[row, :padding] = 0
    return ids, mask


def decoded(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, cache: PTECache) -> torch.Tensor:
    """Log-probabilities of the thoughts, token by token."""
    start, logits = 0, []
    for end in range(PROMPT, LENGTH):
        step = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(model(**step).logits[:, -1].float())
        start = end
    return torch.stack(logits, dim=1).log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]


@torch.no_grad()
def replay_against_decoding(device: str, dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities between the replay and token-by-token decoding."""
    model = tiny(device, dtype).eval()
    ids, mask = batch(device)
    replayed, _ = sequence_logprobs(model, ids, mask, PROMPT)
    return (replayed[:, PROMPT:] - decoded(model, ids, mask, PTECache())).abs().max().item()


@torch.no_grad()
def graph_against_eager(device: str, dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities between steps replayed as a CUDA graph and eager ones."""
    model = tiny(device, dtype).eval()
    ids, mask = batch(device)
    cache = PTECache(cuda_graph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PTE decodes without a CUDA graph")
        actual = decoded(model, ids, mask, cache)
    if device == "cuda" and graph.REPLAYS[cache].step is None:
        return float("nan")
    return (actual - decoded(model, ids, mask, PTECache(cuda_graph=False))).abs().max().item()


def gradients(model: torch.nn.Module, device: str) -> torch.Tensor:
    ids, mask = batch(device)
    model.zero_grad()
    sequence_logprobs(model.train(), ids, mask, PROMPT)[0].mean().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def gradients_of_two_ways(device: str, dtype: torch.dtype, gradient: str) -> float:
    """Relative difference of gradients: offloaded or truncated in two passes, against ordinary autograd."""
    if gradient == "truncated":
        model = tiny(device, dtype, gradient="truncated")
        actual = gradients(model, device)
        with patch("peft_pte.replay.replay.is_sharded", lambda parameters: True):
            expected = gradients(model, device)
    else:
        expected = gradients(tiny(device, dtype), device)
        offloading = tiny(device, dtype, offload=True)
        offloading.gradient_checkpointing_enable()
        actual = gradients(offloading, device)
    return ((actual - expected).norm() / expected.norm()).item()


def captured_against_eager(device: str, dtype: torch.dtype) -> float:
    """Relative difference of gradients of two batches: replayed as one CUDA graph, and eager."""
    model = tiny(device, dtype).train()
    first, second = batch(device)[0].split(2)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return -model(ids, prompt_lengths=PROMPT, use_cache=False).logits[:, PROMPT:].float().log_softmax(-1).mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    steps, differences = CapturedSteps(parameters), []
    for ids in (first, second, first):
        steps(ids, loss_of)
        actual = torch.cat([p.grad.flatten().float() for p in parameters])
        expected = torch.cat([g.flatten().float() for g in torch.autograd.grad(loss_of(ids), parameters)])
        differences.append(((actual - expected).norm() / expected.norm()).item())
    return max(differences)


@torch.no_grad()
def kernels_against_torch(device: str, dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities of decoding with and without Triton kernels."""
    model = tiny(device, dtype).eval()
    ids, mask = batch(device)
    actual = decoded(model, ids, mask, PTECache())
    with plain_torch():
        return (actual - decoded(model, ids, mask, PTECache())).abs().max().item()


# Name: (check, largest allowed value in float32, and in bfloat16, whose rounding differs from way to way).
CHECKS: dict[str, tuple[Callable[[str, torch.dtype], float], float, float]] = {
    "replay = decoding": (replay_against_decoding, 1e-4, 0.25),
    "decoding with kernels = without": (kernels_against_torch, 1e-4, 0.25),
    "offload = plain gradients": (lambda *at: gradients_of_two_ways(*at, "full"), 1e-4, 0.05),
    "truncated = ordinary autograd": (lambda *at: gradients_of_two_ways(*at, "truncated"), 1e-4, 0.05),
}
CAPTURE_CHECKS = {"training step as a CUDA graph = eager": (captured_against_eager, 1e-4, 0.05)}
GRAPH_CHECKS = {"CUDA graph = eager decoding": (graph_against_eager, 1e-4, 0.25)}


def check_models(options: argparse.Namespace, results: Results) -> bool:
    """Whether all is right but for graphs; `options.graphs` says whether those are: decoding is measured without."""
    options.graphs = run_checks(GRAPH_CHECKS, options, results)
    if options.device == "cuda":
        run_checks(CAPTURE_CHECKS, options, results)  # which nothing else rests on
    return run_checks(CHECKS, options, results)


def run_checks(
    checks: dict[str, tuple[Callable[[str, torch.dtype], float], float, float]],
    options: argparse.Namespace,
    results: Results,
) -> bool:
    good = [
        add_check(results, name, dtype, limit, lambda check=check, dtype=dtype: {"": check(options.device, dtype)})
        for name, (check, *limits) in checks.items()
        for dtype, limit in zip((torch.float32, torch.bfloat16), limits)
    ]
    return all(good)


def add_check(
    results: Results, name: str, dtype: torch.dtype, limit: float, run: Callable[[], dict[str, float]]
) -> bool:
    """Add a row for each value that `run` gives; NaN, and what cannot be computed at all, is within no limit."""
    error = ""
    try:
        values = run()
    except Exception as reason:
        traceback.print_exc()
        values, error = {"": float("nan")}, f"{type(reason).__name__}: {str(reason)[:300]}"
    for part, value in values.items():
        row = dict(check=f"{name}{part}", dtype=str(dtype), value=f"{value:.3g}", limit=limit, passed=value <= limit)
        results.add(row | dict(error=error))
    return all(value <= limit for value in values.values())


# --------------------------------------------------------------------------------------------------------- the kernels

# Largest relative root-mean-square error: a few roundings of the dtype, and float32 sums in another order.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Function = Callable[..., list[torch.Tensor]]


class KernelCheck(NamedTuple):
    """A function of ours and its reference, both of the same tensors.

    `has_gradient`: of all of them. `floor`: gradients are compared with their own size, or with this share of what came
    in from above if that is more; for gradients that are the small remainder of cancelling numbers.
    """

    name: str
    kernel: Function
    reference: Function
    tensors: list[torch.Tensor]
    has_gradient: bool = True
    floor: float = 0.0


def kernel_checks(device: str, dtype: torch.dtype) -> Iterator[KernelCheck]:
    """Real head sizes and ranks, with sizes that fill no tile, strided keys, padding and masks."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    layers, rows, tokens, single = 2, 3, 77, torch.float32
    settings = (
        (128, 32, "delta", 0, 2, 0),
        (128, 64, "delta", 0, 2, 0),
        (128, 64, "sum", 0, 1, 0),
        (80, 16, "delta", 1, 4, 0),
        (64, 32, "delta", 0, 1, 0),
        (64, 8, "delta", 0, 2, 0),
        (128, 1, "sum", 0, 1, 0),
        (128, 32, "delta", 0, 2, 1),
        (128, 64, "delta", 0, 4, 1),
        (64, 8, "delta", 0, 1, 1),
    )
    for head_dim, rank, update, turn, size, gates in settings:
        keys_values = [normal(rows, 2, tokens + 9, head_dim)[:, :, 4:-5] for _ in range(2 * layers)]
        weights = [normal(rank, 2 * head_dim, scale=(2 * head_dim) ** -0.5) for _ in range(2 * layers)]
        taps = [normal(size - 1 + gates, rank, scale=0.5) for _ in range(layers)] if size - 1 + gates else []
        cores = normal(layers, rows, rank + size - 1, rank, dtype=single, scale=0.1)
        angles = torch.rand(rows, tokens, head_dim // 2, generator=generator, device=device) * 6.3
        rotation = Rotation(angles.cos(), angles.sin(), bool(turn))
        valid = torch.rand(rows, tokens, generator=generator, device=device) > 0.2

        def encoded(
            encode: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], update=update, *rest: Any
        ) -> list[torch.Tensor]:
            *tensors, cores = tensors
            *columns, taps = (list(tensors[i * layers : (i + 1) * layers]) for i in range(5))
            return [encode(*columns, cores, update, *rest, taps or None)]

        name = f"encode {update} D={head_dim} r={rank} c={size}" + " gated" * gates
        yield KernelCheck(
            name,
            lambda *x, f=encoded, u=update, r=rotation, v=valid: f(peft_pte_kernels.encode, x, u, r, v),
            lambda *x, f=encoded, u=update, r=rotation, v=valid: f(reference.encode, x, u, r, v),
            [*keys_values, *weights, *taps, cores],
            floor=0.1,
        )
    norms = ((32, "none", False), (32, "bound", True), (64, "row", True), (16, "frobenius", False))
    for rank, norm, transposed in norms:
        if dtype != single:  # states are float32 in every model
            break
        tensors = [normal(layers, rows, rank, rank, dtype=single), normal(layers, rank, rank, dtype=single)]
        tensors.append(normal(layers, 1, rank, rank, dtype=single))
        yield KernelCheck(
            f"read_state {norm} r={rank}",
            lambda *x, t=transposed, n=norm: [peft_pte_kernels.read_state(*x, t, n)],
            lambda *x, t=transposed, n=norm: [reference.read_state(*x, t, n)],
            tensors,
        )
    widths, size = (512, 144, 144), 528
    for rank, num_rows, num_tokens in (
        (32, 3, 61),
        (64, 5, 1),
        (16, 70, 1),
        (16, 2, 130),
        (8, 3, 61),
        (1, 64, 16),
        (1, 40, 1),  # fewer rows: gradients of so few numbers that their error is chance
    ):
        bases = [normal(num_rows, num_tokens, width) for width in widths]
        factors = [normal(width, rank) for width in widths] + [normal(rank, size, scale=size**-0.5) for _ in widths]
        state = normal(num_rows, rank, rank, dtype=single, scale=rank**-0.5)

        def updated(
            function: Function, x: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor
        ) -> list[torch.Tensor]:
            return list(function(x, list(rest[:3]), state, list(rest[3:6]), list(rest[6:]), 0.5))

        yield KernelCheck(
            f"low_rank_update r={rank} rows={num_rows} tokens={num_tokens}",
            lambda *x, f=updated: f(peft_pte_kernels.low_rank_update, *x),
            lambda *x, f=updated: f(reference.low_rank_update, *x),
            [normal(num_rows, num_tokens, size), state, *bases, *factors],
        )
        gate = normal(rank, size, scale=size**-0.5)

        def gated(function: Function, x: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
            base, a, b, gate = rest
            return list(function(x, [base], state, [a], [b], 0.5, gate))

        yield KernelCheck(
            f"low_rank_update with a gate r={rank} rows={num_rows} tokens={num_tokens}",
            lambda *x, f=gated: f(peft_pte_kernels.low_rank_update, *x),
            lambda *x, f=gated: f(reference.low_rank_update, *x),
            [normal(num_rows, num_tokens, size), state, bases[0], factors[0], factors[3], gate],
        )
    for vocabulary in (32000, 50257):
        targets = torch.randint(vocabulary, (3, 5), generator=generator, device=device)
        for index, part in enumerate(("logprob", "entropy")):
            yield KernelCheck(
                f"token_logprobs {part} vocabulary={vocabulary}",
                lambda x, t=targets, i=index: [peft_pte_kernels.token_logprobs(x, t, 0.7)[i]],
                lambda x, t=targets, i=index: [reference.token_logprobs(x, t, 0.7)[i]],
                [normal(3, 5, vocabulary, scale=3.0)],
                has_gradient=part == "logprob",
            )
    for head_dim, queries, heads, capacity in ((128, 16, 2, 1100), (80, 8, 8, 300)):
        first = torch.arange(rows, device=device, dtype=torch.int32) * 7
        length = torch.tensor([capacity - 50], device=device, dtype=torch.int32)
        yield KernelCheck(
            f"decode_attention D={head_dim} heads={queries}/{heads}",
            lambda *x, f=first, n=length, s=head_dim**-0.5: [peft_pte_kernels.decode_attention(*x, f, n, s)],
            lambda *x, f=first, n=length, s=head_dim**-0.5: [reference.decode_attention(*x, f, n, s)],
            [normal(rows, queries, 1, head_dim), *(normal(rows, heads, capacity, head_dim) for _ in range(2))],
            has_gradient=False,
        )

    def compacted(function: Callable[..., None], *tensors: torch.Tensor) -> list[torch.Tensor]:
        slots = [x.detach().clone() for x in tensors]
        function(slots, 10, 30, 190)
        return [x[..., :160, :] for x in slots]

    yield KernelCheck(
        "compact",
        lambda *x: compacted(peft_pte_kernels.compact, *x),
        lambda *x: compacted(reference.compact, *x),
        [normal(rows, 2, 200, 128) for _ in range(4)],
        has_gradient=False,
    )


def root_mean_square(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def errors_of(check: KernelCheck) -> dict[str, float]:
    """The largest relative error of results, and of gradients."""
    low = [x.detach().requires_grad_(check.has_gradient) for x in check.tensors]
    high = [x.detach().double().requires_grad_(check.has_gradient) for x in check.tensors]
    actual, expected = check.kernel(*low), check.reference(*high)
    errors = {
        ": forward": max(root_mean_square(x.double() - y) / root_mean_square(y) for x, y in zip(actual, expected))
    }
    if check.has_gradient:
        generator = torch.Generator(actual[0].device).manual_seed(0)
        above = [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for x in actual]
        floor = check.floor * max(root_mean_square(x) for x in above)
        pairs = zip(
            torch.autograd.grad(actual, low, above),
            torch.autograd.grad(expected, high, [x.double() for x in above]),
        )
        errors[": gradient"] = max(root_mean_square(x.double() - y) / max(root_mean_square(y), floor) for x, y in pairs)
    return errors


def check_kernels(options: argparse.Namespace, results: Results) -> bool:
    """On the CPU this compares PyTorch in each dtype with float64."""
    good = [
        add_check(results, check.name, dtype, limit, lambda check=check: errors_of(check))
        for dtype, limit in LIMITS.items()
        for check in kernel_checks(options.device, dtype)
    ]
    return all(good)

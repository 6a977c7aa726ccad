"""Whole models: decoding and training with the kernels are what they are without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import decode, tiny_model, with_adapter
from torch._dynamo.backends.debugging import aot_eager

from peft_pte import PTEConfig
from peft_pte.encoder import Evicted
from peft_pte.layer import current_call
from peft_pte.replay.segments import SegmentCache, SegmentLayer, Stored
from peft_pte.rotary import KeyPositions
from peft_pte_kernels import dispatch, encode_ops, low_rank_ops
from peft_pte_kernels.ops import cache as cache_ops

# Rotations of halves and of neighbours, of a part of a head, none in some layers; fused projections.
FAMILIES = ["llama", "phi3", "glm4", "cohere", "smollm3"]
CONFIGS: list[dict[str, Any]] = [
    dict(),
    dict(state_update="sum"),
    dict(state_update="sum", state_norm="write", state_norm_type="frobenius", conv_size=3),
    dict(state_update="none"),
    dict(num_global_tokens=0, encode_keys="chunk", conv_size=1),
    dict(state_norm="read", encode_keys="post_rope"),
    dict(state_norm="none", write_gate=True),
    dict(state_update="sum", state_norm="bound"),
    dict(alpha_pattern={"k_proj": 3, r"1\.self_attn\.v_proj": 0.5}),
]


# Every family with the default rule, every rule in one family.
CASES = [*((family, {}) for family in FAMILIES), *(("llama", config) for config in CONFIGS[1:])]


@contextmanager
def without_kernels() -> Iterator[None]:
    with patch.object(dispatch, "MODE", "torch"):
        yield


def batch(length: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def adapted(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> torch.nn.Module:
    return with_adapter(tiny_model(family, dtype), **(dict(window_size=8, eviction_ratio=0.5, pte_alpha=1) | config))


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error <= limit, error


@pytest.mark.parametrize("family, config", CASES)
def test_decoding(family: str, config: dict[str, Any]) -> None:
    """Evictions of all layers at once, in place, in prefill and decoding."""
    model, (ids, mask) = adapted(family, **config), batch()
    sizes = [7, 12, 1, 1, 3, 1, 1]
    with without_kernels():
        expected, cache = decode(model, ids, mask, sizes)
    with (
        patch.object(cache_ops, "launch", wraps=cache_ops.launch) as compact,
        patch.object(encode_ops, "launch", wraps=encode_ops.launch) as encode,
    ):
        actual, kernel_cache = decode(model, ids, mask, sizes)
    num_evictions = cache.num_evicted[0] // 4
    assert compact.call_count == num_evictions == 3
    groups = 2 if family == "smollm3" and config.get("encode_keys") != "post_rope" else 1
    expected_launches = 0 if config.get("state_update") == "none" else 2 * num_evictions
    assert encode.call_count in (expected_launches, groups * expected_launches)
    close(actual, expected, 1e-4)
    assert kernel_cache.num_evicted == cache.num_evicted and kernel_cache.nbytes == cache.nbytes
    for one, other in zip(kernel_cache.layers, cache.layers):
        close(one.states["default"], other.states["default"], 1e-3)
        close(one.keys, other.keys, 1e-3)


@pytest.mark.parametrize("family, config", CASES)
def test_gradients(family: str, config: dict[str, Any]) -> None:
    model, (ids, mask) = adapted(family, **config).train(), batch()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, prompt_lengths=7).logits
        logits[:, 7:].log_softmax(-1).gather(-1, ids[:, 7:, None]).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    with without_kernels():
        expected = gradients()
    with patch.object(low_rank_ops, "launch", wraps=low_rank_ops.launch) as launches:
        actual = gradients()
    assert launches.call_count
    whole = torch.cat([x.flatten() for x in expected.values()])
    close(torch.cat([x.flatten() for x in actual.values()]), whole, 1e-4)
    for name, x in expected.items():  # small ones against the size of all
        assert (actual[name] - x).norm() <= 1e-3 * x.norm() + 1e-5 * whole.norm(), name


@pytest.mark.parametrize("training", [dict(gradient="truncated"), dict(offload=True), dict(pte_dropout=0.3)])
def test_ways_of_training(training: dict[str, Any]) -> None:
    """Truncated in two passes, checkpointed with offloading, and dropout, which is drawn for each projection."""
    model, (ids, mask) = adapted("llama", **training).train(), batch()
    if "offload" in training:
        model.gradient_checkpointing_enable()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=ids, attention_mask=mask, prompt_lengths=7).logits[:, 7:].square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    with without_kernels():
        expected = gradients()
    close(gradients(), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Adapters in float32 on a half-precision base, as PEFT makes them; states stay float32."""
    model, (ids, mask) = adapted("llama", dtype), batch()
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").pte_A["default"].weight.dtype == (
        torch.float32
    )
    with without_kernels():
        expected, _ = decode(model, ids, mask, [7] + [1] * 19)
    actual, cache = decode(model, ids, mask, [7] + [1] * 19)
    close(actual, expected, 0.05)
    assert cache.layers[0].states["default"].dtype == torch.float32


def test_several_adapters() -> None:
    """Two adapters active together, of different ranks and rules, and a layer that has none."""
    model, (ids, mask) = adapted("llama"), batch()
    second = dict(state_update="sum", r=9, init_weights=False, layers_to_transform=[1])
    config = PTEConfig(task_type="CAUSAL_LM", window_size=8, eviction_ratio=0.5, **second)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with without_kernels():
        expected, _ = decode(model, ids, mask, [7] + [1] * 19)
    actual, cache = decode(model, ids, mask, [7] + [1] * 19)
    close(actual, expected, 1e-4)
    assert set(cache.layers[0].states) == {"default"} and set(cache.layers[1].states) == {"default", "second"}


def test_generate_draws_the_same_tokens() -> None:
    model, (ids, mask) = adapted("qwen2"), batch(9)
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    with without_kernels():
        expected = model.generate(**options)
    assert torch.equal(model.generate(**options), expected)


def test_siblings_are_computed_together() -> None:
    """Launches for q, k and v together, and for o, in both layers: one each for a segment, two for single tokens."""
    model, (ids, mask) = adapted("llama"), batch(12)
    for length, launched in ((12, 1), (1, 2)):
        with torch.no_grad(), patch.object(low_rank_ops, "launch", wraps=low_rank_ops.launch) as launches:
            model(input_ids=ids[:, -length:], attention_mask=mask[:, -length:], prompt_lengths=length)
        assert launches.call_count == 2 * 2 * launched
    assert current_call.get() is None


def test_what_was_asked_for_and_cannot_be_done_is_refused() -> None:
    """`PTE_KERNELS=triton` in float64; `auto` would take PyTorch."""
    model, (ids, mask) = adapted("llama", torch.float64), batch()
    with pytest.raises(ValueError, match="PTE_KERNELS=triton was asked for, but a tensor is torch.float64"):
        model(input_ids=ids, attention_mask=mask, prompt_lengths=7)
    with patch.object(dispatch, "MODE", "auto"):
        model(input_ids=ids, attention_mask=mask, prompt_lengths=7)


def test_a_layer_compiles_to_one_graph() -> None:
    """A whole decoder layer with its hooks: what was evicted is encoded and read, and q, k, v and o are updated."""
    model = adapted("llama")
    decoder = model.get_submodule("base_model.model.model")
    layer, encoder = decoder.layers[0], decoder.layers[0].self_attn.thought_encoder
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 32, generator=generator, requires_grad=True)
    keys, values = torch.randn(2, 2, 2, 4, 8, generator=generator)
    positions = torch.arange(5)[None].expand(2, -1) + 4

    def forward(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
        gone = KeyPositions(decoder.rotary_emb, positions[:, :4] - 4)
        past = SegmentLayer([], {"default": Stored(core)}, lambda: Evicted(keys, values, gone, None), 4)
        return layer(
            x,
            attention_mask=None,
            position_ids=positions,
            past_key_values=SegmentCache(layers=[past]),
            position_embeddings=decoder.rotary_emb(x, positions),
        )

    def gradients(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [encoder.pte_key["default"].weight, layer.self_attn.o_proj.pte_A["default"].weight]
        return torch.autograd.grad(output.square().sum(), [x, *weights])

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    arguments = x, keys, values, torch.zeros(2, 6, 5)
    expected = forward(*arguments)
    actual = torch.compile(forward, fullgraph=True, backend=backend)(*arguments)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    for op, count in (("encode_cores", 1), ("read_states", 1), ("low_rank", 2)):
        assert sum(name.startswith(f"peft_pte_kernels.{op}.") for name in names) == count, names
    close(actual, expected, 1e-5)
    for one, other in zip(gradients(actual), gradients(expected)):
        close(one, other, 1e-5)

"""How many operations evictions and training take: bounds for what a small model's speed hangs on, its launches.

Kernels are not run here, only counted: how many there are does not depend on values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from models import decode, tiny_model, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pte import sequence_logprobs
from peft_pte.cache.eviction import evict
from peft_pte.families import find_decoder
from peft_pte_kernels import cache_ops, encode_ops, logprobs_ops, low_rank_ops, state_ops

# They launch nothing: other views of the same memory, and memory as it comes.
VIEWS = (
    *("view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t"),
    *("detach", "alias", "narrow", "unbind", "split", "as_strided", "empty", "new_empty", "empty_like"),
)


class Operations(TorchDispatchMode):
    """Counts what is dispatched: operations of PyTorch without views, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, name = func.name().split("::")
        name = name.partition(".")[0]
        if namespace == "aten" and name not in VIEWS:  # what an op of ours does inside is not seen, its kernels are
            self.torch[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, *args: Any, **kwargs: Any) -> None:
        self.kernels += 1


@contextmanager
def counted() -> Iterator[Operations]:
    """Count the operations of a block, in which kernels leave their results as they are."""
    modules = (cache_ops, encode_ops, logprobs_ops, low_rank_ops, state_ops)
    with ExitStack() as stack, Operations() as found:
        for module in modules:
            stack.enter_context(patch.object(module, "launch", found.launch))
        yield found


def eviction(num_layers: int, **config: Any) -> Operations:
    """The second eviction of a cache."""
    base = tiny_model("llama", torch.float32, num_hidden_layers=num_layers)
    model = with_adapter(base, window_size=4, eviction_ratio=0.5, **config)
    ids = torch.randint(3, 61, (2, 5 + 4 + 2), generator=torch.Generator().manual_seed(0))
    _, cache = decode(model, ids, None, [5, 6])
    assert cache.num_evicted == [2, 2]
    with torch.no_grad(), counted() as found:
        evict(cache, None, find_decoder(model))
    assert cache.num_evicted == [4, 4]
    return found


@pytest.mark.parametrize(
    "config, most, kernels",
    [
        (dict(), 30, 4),
        (dict(write_gate=True), 30, 4),
        (dict(state_update="sum"), 24, 4),
        (dict(state_update="sum", state_norm="write"), 26, 4),
        (dict(state_update="sum", state_norm="write", conv_size=3), 28, 4),
        (dict(state_update="none"), 18, 1),
        (dict(num_global_tokens=0), 22, 4),
    ],
)
def test_an_eviction_takes_as_many_operations_for_any_number_of_layers(
    config: dict[str, Any], most: int, kernels: int
) -> None:
    few, many = eviction(2, **config), eviction(5, **config)
    assert many.torch == few.torch
    assert few.kernels == many.kernels == kernels
    assert few.torch.total() <= most, few.torch


def training(num_layers: int, num_segments: int, adapted: bool = True, **config: Any) -> tuple[Operations, Operations]:
    """Forward and backward pass, with segments of two tokens after the first; or those of the base model alone."""
    model = tiny_model("llama", torch.float32, num_hidden_layers=num_layers)
    checkpointing = config.pop("checkpointing", False)
    if adapted:
        model = with_adapter(model, window_size=4, eviction_ratio=0.5, **config).train()
    else:
        model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    embeds = torch.randn(2, 5 + 4 + 2 * num_segments, 32, requires_grad=True)
    with counted() as forward:
        logits = model(inputs_embeds=embeds, **(dict(prompt_lengths=5) if adapted else {})).logits
    with counted() as backward:
        logits.backward(torch.ones_like(logits))
    return forward, backward


class Counts(NamedTuple):
    """Operations of PyTorch, and kernels."""

    torch: float
    kernels: float

    @classmethod
    def of(cls, operations: Operations) -> Counts:
        return cls(operations.torch.total(), operations.kernels)


def slope(low: Counts, high: Counts, steps: int) -> Counts:
    return Counts(*((b - a) / steps for a, b in zip(low, high)))


def per_layer_and_segment(**config: Any) -> tuple[Counts, Counts]:
    """What a layer adds to what a segment adds, forward and backward."""

    def per_segment(num_layers: int) -> list[Counts]:
        few, many = (map(Counts.of, training(num_layers, number, **config)) for number in (5, 7))
        return [slope(low, high, 2) for low, high in zip(few, many)]

    return tuple(slope(low, high, 1) for low, high in zip(per_segment(2), per_segment(3)))


@pytest.mark.parametrize("rule", [dict(), dict(state_update="sum"), dict(state_update="sum", state_norm="write")])
@pytest.mark.parametrize("way", [dict(), dict(checkpointing=True), dict(gradient="truncated")])
def test_training_adds_few_operations_to_those_of_the_base_model(rule: dict[str, Any], way: dict[str, Any]) -> None:
    """In each layer and segment, where the base model has its own in each layer. Encoding and reading are not among
    them: they are done for all layers together. Computing segments again costs no more than the first time."""
    training(2, 5)  # finds out, once in a process, how the family rotates
    few, many = (map(Counts.of, training(layers, 0, adapted=False)) for layers in (2, 3))
    base_forward, base_backward = (slope(low, high, 1) for low, high in zip(few, many))
    forward, backward = per_layer_and_segment(**rule, **way)
    assert forward.kernels == 2  # of q, k and v, and of o
    assert forward.torch <= base_forward.torch + 4
    again = forward if way else Counts(0, 0)
    assert backward.kernels == 2 + again.kernels
    assert backward.torch <= base_backward.torch + 24 + again.torch


@pytest.mark.parametrize("way", [dict(), dict(checkpointing=True), dict(gradient="truncated")])
@pytest.mark.parametrize("padded", [False, True])
def test_no_segment_makes_the_host_wait(way: dict[str, Any], padded: bool) -> None:
    """Log-probabilities forward and backward: how often the host reads from the device does not depend on length."""
    config = {name: value for name, value in way.items() if name != "checkpointing"}
    model = with_adapter(tiny_model("llama", torch.float32), window_size=4, eviction_ratio=0.5, **config).train()
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
    waits = []
    for num_segments in (3, 6):
        ids = torch.randint(3, 61, (2, 5 + 4 + 2 * num_segments), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :2] = int(not padded)
        with counted() as found:
            sequence_logprobs(model, ids, mask, prompt_lengths=5)[0].sum().backward()
        assert found.kernels
        waits.append({name: found.torch[name] for name in ("_local_scalar_dense", "nonzero", "item")})
    assert waits[0] == waits[1] and waits[0]["_local_scalar_dense"] > 0

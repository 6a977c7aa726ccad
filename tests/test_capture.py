"""What a CUDA graph of a training step wants: the host reads nothing from the device, and copies nothing to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_model, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pte import PTEConfig
from peft_pte.replay.layout import Layout
from peft_pte_kernels.ops.encode import written_by_device


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices; reading a value off the meta device fails by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            assert args[0].device == args[1].device, f"copy from {args[1].device} to {args[0].device}"
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]).type == args[0].device.type, f"copy to {kwargs['device']}"
        return func(*args, **kwargs)


def on_meta(family: str = "llama", **settings: Any) -> torch.nn.Module:
    return with_adapter(tiny_model(family, torch.float32), **(dict(window_size=16) | settings)).to("meta").train()


def loss(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    """Of rows of 70 tokens, which evict more than once."""
    ids = torch.empty(4, 70, device="meta", dtype=torch.long)
    return model(input_ids=ids, use_cache=False, **options).logits.logsumexp(-1).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(state_update="sum", state_norm="write"),
        dict(state_update="none"),
        dict(retained_prefix=4),
        dict(eviction_ratio=0.5, checkpointed=True),
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(settings: dict[str, Any]) -> None:
    """Rows without padding whose prompts' lengths the host knows."""
    model = on_meta(**{key: value for key, value in settings.items() if key != "checkpointed"})
    if "checkpointed" in settings:
        model.gradient_checkpointing_enable()
    waits_for_nothing(model, 3)


@pytest.mark.parametrize("prompts", [3, [3, 3, 3, 3], torch.full((4,), 3)], ids=["int", "list", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_in_other_families_and_ways_to_say_it(family: str, prompts: Any) -> None:
    waits_for_nothing(on_meta(family), prompts)


def waits_for_nothing(model: torch.nn.Module, prompts: Any) -> None:
    with NoCopies():
        loss(model, prompt_lengths=prompts).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_the_device_knows_is_asked_for() -> None:
    """So that the test above can fail: a mask and lengths on the device must be read."""
    ones = torch.ones(4, 70, device="meta", dtype=torch.long)
    for options in (dict(attention_mask=ones, prompt_lengths=3), dict(prompt_lengths=ones[:, 0])):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
            loss(on_meta(), **options)


@pytest.mark.parametrize("is_padded", [False, True])
def test_layouts_move(is_padded: bool) -> None:
    """Values do where they are needed; masks of ones are made on the other side."""
    valid = torch.ones(3, 60, dtype=torch.bool)
    valid[1, :5] = not is_padded
    layout = Layout.create(valid, torch.tensor([5, 9, 5]), PTEConfig(window_size=16).cache_policy)
    moved = layout.to(torch.device("meta"))
    assert (layout.source is not None) and layout.to(torch.device("cpu")).source is layout.source
    for name in ("given", "valid", "source", "target"):
        before, after = getattr(layout, name), getattr(moved, name)
        assert after.device.type == "meta" and (after.shape, after.dtype) == (before.shape, before.dtype)
    assert (moved.prefix, moved.window) == (layout.prefix, layout.window)


def test_a_table_of_addresses_can_be_written_by_the_device() -> None:
    """A graph's kernels must not read it from host memory, which is another's when the graph is replayed."""
    numbers = [[2**40 + 16, 2**47 - 16, 0], [1, 2**33, 7]]
    written = written_by_device(numbers, torch.device("cpu"))
    assert written.dtype == torch.int64 and written.tolist() == numbers

"""Whether layers are checkpointed: not inside of segments, which are checkpointed as wholes instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from ..compiling import uncompiled

# Inside of a segment or step, in the thread that computes it.
in_segment: ContextVar[bool] = ContextVar("pte_segment", default=False)


class CheckpointingFlag:
    """A module's `gradient_checkpointing`, if that is on: true, but not inside of a segment.

    A checkpointed layer drops its cache, and with it the thoughts; the replay checkpoints whole segments instead. The
    flag itself stays as it is, since another thread may use the model at the same time.
    """

    def __bool__(self) -> bool:
        # The compiler knows no context variables, and compiles nothing but segments.
        return not (torch.compiler.is_compiling() or in_segment.get())


def flagged_modules(decoder: nn.Module) -> list[nn.Module]:
    """The decoder and its layers, as far as gradient checkpointing is switched on for them."""
    flags = {module: getattr(module, "gradient_checkpointing", False) for module in (decoder, *decoder.layers)}
    return [module for module, flag in flags.items() if flag or isinstance(flag, CheckpointingFlag)]


@uncompiled
def checkpoints_layers(decoder: nn.Module) -> bool:
    """Whether gradient checkpointing was switched on for the model.

    Raises:
        ValueError: it was switched on in its reentrant form.
    """
    flagged = flagged_modules(decoder)
    for module in flagged:
        if getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "PTE does not support reentrant gradient checkpointing: it would lose the gradients through cached "
                "keys, values and states. Use `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
    return bool(flagged)


@contextlib.contextmanager
def layer_checkpointing_off(decoder: nn.Module) -> Iterator[None]:
    """The layers do not checkpoint in this call, also if it is repeated in the backward pass."""
    for module in flagged_modules(decoder):
        if not isinstance(module.gradient_checkpointing, CheckpointingFlag):
            module.gradient_checkpointing = CheckpointingFlag()
    token = in_segment.set(True)
    try:
        yield
    finally:
        in_segment.reset(token)


def restore_checkpointing_flags(decoder: nn.Module) -> None:
    """Leave plain flags behind."""
    for module in decoder.modules():
        if isinstance(getattr(module, "gradient_checkpointing", None), CheckpointingFlag):
            module.gradient_checkpointing = True
